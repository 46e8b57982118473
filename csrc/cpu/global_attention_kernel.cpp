// Global self-attention, forward; compiled once per instruction set.
#include "global_attention_steps.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Task h packs the norm, task `head` the weights of that head.
template <typename T>
void pack(const AttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Call<T> call(args);
  const AttentionShape& shape = args.shape;
  const int64_t C = shape.width(), d = shape.head_dim, stride = call.layout.head;
  const int64_t depth = depth_of<T>(C);
  for (int64_t task = begin; task < end; ++task) {
    if (task == shape.heads) {
      pack_norm(call);
      continue;
    }
    Acc* bias = call.packed_head(task);
    Acc* panel = bias + stride;
    const auto source_row = [&](int64_t column) { return column / d * C + task * d + column % d; };
    for (int64_t j = 0; j < stride; ++j) {
      bias[j] = j < 3 * d ? value_at<T, Acc>(args.qkv_bias, source_row(j)) : Acc{0};
    }
    for (int64_t first = 0; first < stride; first += tile_columns<V>) {
      const int64_t columns = smaller(tile_columns<V>, stride - first);
      // In runs of rows that follow one another in the source.
      for (int64_t j = 0; j < columns;) {
        const int64_t column = first + j;
        if (column >= 3 * d) {
          for (int64_t k = 0; k < depth; ++k) {
            for (int64_t i = j; i < columns; ++i) panel[k * columns + i] = 0;
          }
          break;
        }
        const int64_t run = smaller(columns - j, d - column % d);
        const int64_t offset = source_row(column) * C;
        if (!args.qkv_weight.is_accumulator) {
          const T* rows = static_cast<const T*>(args.qkv_weight.data) + offset;
          if constexpr (Products<T>::pairs) {
            // Rows of bfloat16 are rows of pairs.
            const float* words = reinterpret_cast<const float*>(rows);
            transpose(run, C / 2, words, C / 2, panel + j, columns);
          } else {
            transpose(run, C, rows, C, panel + j, columns);
          }
        } else {
          const Acc* rows = static_cast<const Acc*>(args.qkv_weight.data) + offset;
          if constexpr (Products<T>::pairs) {
            Acc* row = static_cast<Acc*>(memory);
            for (int64_t i = 0; i < run; ++i) {
              copy_columns(1, C, rows + i * C, C, row, C);
              pair_columns(row, C);
              for (int64_t k = 0; k < C / 2; ++k) panel[k * columns + j + i] = row[k];
            }
          } else {
            transpose(run, C, rows, C, panel + j, columns);
          }
        }
        j += run;
      }
      panel += depth * columns;
    }
  }
}

// [Q, K, V] of one head for `count` normalised tokens, an even number but for the last; also as the
// backward reads them, where `kept` is not null.
template <typename T>
void project_head(const Call<T>& call, int64_t head, int64_t count, const AccumulatorOf<T>* y,
    AccumulatorOf<T>* qkv, AccumulatorOf<T>* kept) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t depth = depth_of<T>(call.shape.width()), stride = call.layout.head;
  const Acc* bias = call.packed_head(head);
  const Acc* panel = bias + stride;
  for (int64_t first = 0; first < stride; first += tile_columns<V>) {
    const int64_t columns = smaller(tile_columns<V>, stride - first);
    multiply<false, V, typename Products<T>::type>(count, columns, depth, {y, call.layout.width},
        {panel, columns}, {bias + first, 0}, {qkv + first, stride});
    panel += depth * columns;
  }
  if (kept != nullptr) copy_columns(1, count * stride, qkv, 0, kept, 0);
  if constexpr (Products<T>::pairs) {
    // Along the channels of Q and K, along the tokens of V.
    const int64_t d = call.shape.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      Acc* row = qkv + i * stride;
      pair_columns(row, d);
      pair_columns(row + d, d);
      if (i % 2 == 0) {
        Acc* next = i + 1 < count ? row + stride + 2 * d : nullptr;
        pair_rows(row + 2 * d, next, call.layout.dim);
      }
    }
  }
}

// Where a head's [Q, K, V] are kept, or null.
template <typename T>
AccumulatorOf<T>* kept_of(
    const Call<T>& call, const AttentionForward& args, int64_t image, int64_t head) {
  if (args.kept == nullptr) return nullptr;
  return static_cast<AccumulatorOf<T>*>(args.kept) + call.qkv_offset(image, head);
}

// Queries [begin, end) of one head against all its keys: softmax over blocks of keys with a running
// maximum and sum, then the residual.
template <typename T>
void attend_rows(const Call<T>& call, const AttentionForward& args, int64_t image, int64_t head,
    int64_t begin, int64_t end, const AccumulatorOf<T>* qkv, const AccumulatorOf<T>* keys,
    Scratch<AccumulatorOf<T>> scratch) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  using Layout = AttentionLayout;
  const AttentionLayout& layout = call.layout;
  const int64_t C = call.shape.width(), d = call.shape.head_dim, M = call.shape.tokens;
  const AttentionDropout& dropout = args.dropout;
  const int64_t rows = end - begin;
  Acc* scores = scratch.take(Layout::query_block * Layout::key_block);
  Acc* sums = scratch.take(Layout::query_block * layout.dim);
  Acc* part = scratch.take(Layout::query_block * layout.dim);
  Acc* shrinks = scratch.take(Layout::query_block);
  Acc* maxima = scratch.take(Layout::query_block);
  Acc* totals = scratch.take(Layout::query_block);
  constexpr Acc infinity = static_cast<Acc>(__builtin_inf());
  using Product = typename Products<T>::type;
  const int64_t value_stride = Products<T>::pairs ? 2 * layout.head : layout.head;
  const int64_t offset = (image * M + begin) * C + head * d;
  const T* x = static_cast<const T*>(args.x) + offset;
  T* out = static_cast<T*>(args.out) + offset;
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(x + i * C, d);
    prefetch(out + i * C, d);
  }

  for (int64_t first = 0; first < M; first += Layout::key_block) {
    const int64_t count = smaller(Layout::key_block, M - first);
    const int64_t columns = padded(count);
    multiply<false, V, Product>(rows, columns, depth_of<T>(d),
        {qkv + begin * layout.head, layout.head}, {keys + first, layout.keys}, {nullptr, 0},
        {scores, Layout::key_block});
    // One pass after the other, since within a row each waits for the one before.
    for (int64_t i = 0; i < rows; ++i) {
      Acc* row = scores + i * Layout::key_block;
      fill_rest<V>(row, count, columns, -infinity);
      Acc maximum = row_maximum<V>(row, columns) * call.scale;
      if (first > 0) {
        maximum = maximum > maxima[i] ? maximum : maxima[i];
        shrinks[i] = exponential(maxima[i] - maximum);
      }
      maxima[i] = maximum;
    }
    const V scale = V::fill(call.scale);
    for (int64_t i = 0; i < rows; ++i) {
      Acc* row = scores + i * Layout::key_block;
      const V down = V::fill(-maxima[i]);
      V total = V::zero();
      for (int64_t j = 0; j < columns; j += V::size) {
        const V weight = exp(fma(V::load(row + j), scale, down));
        total = total + weight;
        weight.store(row + j);
      }
      const Acc sum = sum_of(total);
      totals[i] = first > 0 ? totals[i] * shrinks[i] + sum : sum;
    }
    if (dropout.p > 0) {
      for (int64_t i = 0; i < rows; ++i) {
        Acc* row = scores + i * Layout::key_block;
        drop(dropout, image, head, begin + i, first, count, row);
      }
    }
    if constexpr (Products<T>::pairs) {
      for (int64_t i = 0; i < rows; ++i) pair_columns(scores + i * Layout::key_block, columns);
    }
    multiply<false, V, Product>(rows, layout.dim, depth_of<T>(count), {scores, Layout::key_block},
        {qkv + first * layout.head + 2 * d, value_stride}, {nullptr, 0},
        {first > 0 ? part : sums, layout.dim});
    if (first == 0) continue;
    for (int64_t i = 0; i < rows; ++i) {
      const V shrink = V::fill(shrinks[i]);
      Acc* sum = sums + i * layout.dim;
      for (int64_t c = 0; c < layout.dim; c += V::size) {
        fma(V::load(sum + c), shrink, V::load(part + i * layout.dim + c)).store(sum + c);
      }
    }
  }

  Acc* lse = static_cast<Acc*>(args.lse) + (image * call.shape.heads + head) * M;
  const Acc kept = static_cast<Acc>(1.0 - dropout.p);
  for (int64_t i = 0; i < rows; ++i) {
    const V factor = V::fill(Acc{1} / (totals[i] * kept));
    const Acc* sum = sums + i * layout.dim;
    for_each_register<V>(d, [&](int64_t c, int64_t n) {
      const V residual = load_part<V>(x + i * C + c, n);
      store_part(fma(V::load(sum + c), factor, residual), out + i * C + c, n);
    });
  }
  for (int64_t i = 0; i < rows; ++i) lse[begin + i] = maxima[i] + logarithm(totals[i]);
}

template <typename T>
void few(const AttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const Call<T> call(args);
  const AttentionLayout& layout = call.layout;
  const int64_t M = args.shape.tokens;
  Scratch<Acc> scratch(memory);
  Acc* y = scratch.take(M * layout.width);
  Acc* qkv = scratch.take(M * layout.head);
  Acc* keys = scratch.take(args.shape.head_dim * layout.keys);
  int64_t normalised = -1;
  clear_padding(call, keys);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / args.shape.heads, head = task % args.shape.heads;
    if (image != normalised) normalise_tokens(call, image, 0, M, y);
    normalised = image;
    project_head(call, head, M, y, qkv, kept_of(call, args, image, head));
    const int64_t d = args.shape.head_dim;
    transpose(M, depth_of<T>(d), qkv + d, layout.head, keys, layout.keys);
    for (int64_t i = 0; i < M; i += AttentionLayout::query_block) {
      const int64_t last = smaller(i + AttentionLayout::query_block, M);
      attend_rows(call, args, image, head, i, last, qkv, keys, scratch);
    }
  }
}

// Normalises a block of tokens and projects all its heads.
template <typename T>
void project(const AttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const Call<T> call(args);
  const AttentionLayout& layout = call.layout;
  const int64_t M = args.shape.tokens, d = args.shape.head_dim;
  Acc* y = static_cast<Acc*>(memory);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / layout.token_blocks;
    const int64_t first = task % layout.token_blocks * AttentionLayout::token_block;
    const int64_t count = smaller(AttentionLayout::token_block, M - first);
    normalise_tokens(call, image, first, count, y);
    for (int64_t head = 0; head < args.shape.heads; ++head) {
      Acc* qkv = static_cast<Acc*>(args.qkv) + call.qkv_offset(image, head) + first * layout.head;
      Acc* kept = kept_of(call, args, image, head);
      if (kept != nullptr) kept += first * layout.head;
      project_head(call, head, count, y, qkv, kept);
      Acc* keys = static_cast<Acc*>(args.keys) + call.keys_offset(image, head);
      transpose(count, depth_of<T>(d), qkv + d, layout.head, keys + first, layout.keys);
      if (first + count == M) clear_padding(call, keys);
    }
  }
}

template <typename T>
void attend(const AttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const Call<T> call(args);
  const int64_t blocks = call.layout.query_blocks;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks % args.shape.heads;
    const int64_t image = task / blocks / args.shape.heads;
    const int64_t first = task % blocks * AttentionLayout::query_block;
    const int64_t last = smaller(first + AttentionLayout::query_block, args.shape.tokens);
    attend_rows(call, args, image, head, first, last,
        static_cast<const Acc*>(args.qkv) + call.qkv_offset(image, head),
        static_cast<const Acc*>(args.keys) + call.keys_offset(image, head), Scratch<Acc>(memory));
  }
}

template <typename T>
constexpr AttentionForwardKernels kernels{pack<T>, few<T>, project<T>, attend<T>};

}  // namespace

DSNET_DEFINE_KERNELS(AttentionForwardKernels, global_attention_forward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
