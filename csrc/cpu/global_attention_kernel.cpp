// Global self-attention, forward; compiled once per instruction set.
#include "global_attention_projection.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

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
    project_head(call, head, M, y, qkv);
    const int64_t d = args.shape.head_dim;
    transpose(M, depth_of<T>(d), qkv + d, layout.head, keys, layout.keys);
    for (int64_t i = 0; i < M; i += AttentionLayout::query_block) {
      const int64_t last = smaller(i + AttentionLayout::query_block, M);
      attend_rows(call, args, image, head, i, last, qkv, keys, scratch);
    }
  }
}

template <typename T>
void attend(const AttentionForward& args, void* memory, int64_t begin, int64_t end) {
  const Call<T> call(args);
  const int64_t blocks = call.layout.query_blocks;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks % args.shape.heads;
    const int64_t image = task / blocks / args.shape.heads;
    const int64_t first = task % blocks * AttentionLayout::query_block;
    const int64_t last = smaller(first + AttentionLayout::query_block, args.shape.tokens);
    attend_rows(call, args, image, head, first, last, qkv_of(call, image, head),
        transposed_of(call, args.keys, image, head), Scratch<AccumulatorOf<T>>(memory));
  }
}

template <typename T>
constexpr AttentionForwardKernels kernels{pack<T>, few<T>, project<T>, attend<T>};

}  // namespace

DSNET_DEFINE_KERNELS(AttentionForwardKernels, global_attention_forward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
