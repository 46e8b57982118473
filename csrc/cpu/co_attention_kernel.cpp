// Bidirectional co-attention, forward; compiled once per instruction set.
//
// Scores lie as (global tokens, local tokens): the softmax over global tokens then runs along
// registers' lanes side by side, that over local tokens along rows, with a running maximum and sum.
#include "co_attention_steps.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Softmax over the rows, for R registers of columns: exp(score + bias − maximum).
template <typename V, int R, typename Acc = typename V::Acc>
inline void soften_columns(
    int64_t rows, Acc* scores, int64_t stride, const Acc* bias, Acc* maxima, Acc* totals) {
  V largest[R], total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    largest[r] = V::load(scores + r * V::size) + V::fill(bias[0]);
    total[r] = V::zero();
  }
  for (int64_t m = 1; m < rows; ++m) {
    const V b = V::fill(bias[m]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      largest[r] = larger(largest[r], V::load(scores + m * stride + r * V::size) + b);
    }
  }
  for (int64_t first = 0; first < rows; first += sum_block) {
    V part[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = V::zero();
    for (int64_t m = first; m < smaller(first + sum_block, rows); ++m) {
      const V b = V::fill(bias[m]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Acc* score = scores + m * stride + r * V::size;
        const V weight = exp(V::load(score) + b - largest[r]);
        part[r] = part[r] + weight;
        weight.store(score);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r] = total[r] + part[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    largest[r].store(maxima + r * V::size);
    total[r].store(totals + r * V::size);
  }
}

// Sums that are stored as factor[row] · sum + start.
template <typename V, typename Acc = typename V::Acc>
struct ScaledTo {
  const Acc* factors;
  Start<Acc> start;
  Matrix<Acc> c;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    V before[R][N];
    From<V>{start}(before, row, column);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V factor = V::fill(factors[row + i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = fma(sums[i][j], factor, before[i][j]);
    }
    To<V>{c}(sums, row, column);
  }
};

// A tile of local tokens and what belongs to it.
template <typename Acc>
struct Tile {
  int64_t image, first, count, columns;
  Acc *tokens, *transposed, *words;  // see load_tile
  Acc *qkv, *queries, *keys;         // of one head: (columns, head), (d, columns) twice
  Acc *scores, *out;                 // (M or row_block, tile), (columns, local)
  Acc *maxima, *totals;              // (tile)
  Acc* heads_out;                    // (columns, dim)
  Acc *row_maxima, *row_shrinks;     // (row_block)
};

// Attention of the tile's local tokens to the global ones, added to tile.out.
template <typename T>
void attend_to_global(const CoCall<T>& call, int64_t h, const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  using Product = typename Products<T>::type;
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = call.shape.global_tokens, inner = layout.inner, stride = layout.tile;
  const Acc* bias = call.score_bias(tile.image, h);
  Acc* right = layout.absorbed ? tile.transposed : tile.queries;
  const int64_t right_stride = layout.absorbed ? stride : right_of<T>(right, stride).stride;
  multiply<false, V, Product>(M, tile.columns, depth_of<T>(layout.depth),
      {call.met(tile.image, h, 0), inner}, {right, right_stride}, {nullptr, 0},
      {tile.scores, stride});
  int64_t j = 0;
  for (; j + 3 * V::size <= tile.columns; j += 3 * V::size) {
    soften_columns<V, 3>(M, tile.scores + j, stride, bias, tile.maxima + j, tile.totals + j);
  }
  for (; j < tile.columns; j += V::size) {
    soften_columns<V, 1>(M, tile.scores + j, stride, bias, tile.maxima + j, tile.totals + j);
  }
  const AttentionDropout& dropout = call.args.dropout;
  if (dropout.p > 0) {
    drop_columns(dropout, tile.image, h, tile.first, tile.count, M, tile.scores, stride);
  }
  Acc* softmax = static_cast<Acc*>(call.args.local_softmax) +
                 ((tile.image * call.shape.heads + h) * call.shape.local_tokens + tile.first) * 2;
  for (int64_t i = 0; i < tile.count; ++i) {
    softmax[2 * i] = tile.maxima[i];
    softmax[2 * i + 1] = tile.totals[i];
  }
  // Weights are divided by their sums where their products are complete.
  const Acc kept = static_cast<Acc>(1.0 - dropout.p);
  for (int64_t i = 0; i < tile.columns; ++i) tile.totals[i] = Acc{1} / (tile.totals[i] * kept);
  const Matrix<const Acc> weights = as_right<T>(tile.scores, M, tile.columns, stride);
  const Matrix<const Acc> values = right_of<T>(call.met(tile.image, h, 2), inner);
  const Start<Acc> start{h > 0 ? tile.out : call.local_proj_bias(), h > 0 ? layout.local : 0};
  if (layout.absorbed) {
    multiply_with<true, V, Product>(tile.count, inner, depth_of<T>(M), weights, values, From<V>{},
        ScaledTo<V>{tile.totals, start, {tile.out, layout.local}});
    return;
  }
  multiply_with<true, V, Product>(tile.count, inner, depth_of<T>(M), weights, values, From<V>{},
      ScaledTo<V>{tile.totals, {nullptr, 0}, {tile.heads_out, inner}});
  if constexpr (Products<T>::pairs) {
    for (int64_t i = 0; i < tile.count; ++i) pair_columns(tile.heads_out + i * inner, inner);
  }
  multiply_packed<V, T>(tile.count, layout.local, layout.depth, {tile.heads_out, inner},
      call.matrix(h, layout.proj), start, {tile.out, layout.local});
}

// Where a chunk keeps its share of one head.
template <typename T>
AccumulatorOf<T>* partial_of(const CoCall<T>& call, const CoAttentionForward& args, int64_t image,
    int64_t chunk, int64_t h) {
  const int64_t index = (image * call.layout.chunks + chunk) * call.shape.heads + h;
  return static_cast<AccumulatorOf<T>*>(args.partials) + index * call.layout.partial;
}

// Attention of the global tokens to the tile's local ones, added to the chunk's share.
template <typename T>
void attend_to_local(const CoCall<T>& call, int64_t h, const Tile<AccumulatorOf<T>>& tile,
    AccumulatorOf<T>* partial) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  using Product = typename Products<T>::type;
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = call.shape.global_tokens, inner = layout.inner, stride = layout.tile;
  Acc *maxima = partial, *totals = partial + layout.rows, *kept = partial + 2 * layout.rows;
  Acc* sums = partial + 3 * layout.rows;
  Acc* right = layout.absorbed ? tile.transposed : tile.keys;
  const int64_t right_stride = layout.absorbed ? stride : right_of<T>(right, stride).stride;
  const Acc* values = layout.absorbed ? tile.tokens : tile.qkv + 2 * call.shape.head_dim;
  const AttentionDropout& dropout = call.args.dropout;
  for (int64_t first = 0; first < M; first += CoAttentionLayout::row_block) {
    const int64_t rows = smaller(CoAttentionLayout::row_block, M - first);
    multiply<false, V, Product>(rows, tile.columns, depth_of<T>(layout.depth),
        {call.met(tile.image, h, 1) + first * inner, inner}, {right, right_stride}, {nullptr, 0},
        {tile.scores, stride});
    constexpr Acc infinity = static_cast<Acc>(__builtin_inf());
    for (int64_t m = 0; m < rows; ++m) {
      Acc* row = tile.scores + m * stride;
      fill_rest<V>(row, tile.count, tile.columns, -infinity);
      const Acc maximum = row_maximum<V>(row, tile.columns);
      const Acc before = maxima[first + m];
      tile.row_maxima[m] = maximum > before ? maximum : before;
    }
    for (int64_t m = 0; m < rows; m += V::size) {
      exp(V::load(maxima + first + m) - V::load(tile.row_maxima + m)).store(tile.row_shrinks + m);
    }
    for (int64_t m = 0; m < rows; ++m) {
      Acc* row = tile.scores + m * stride;
      const V maximum = V::fill(tile.row_maxima[m]);
      V total = V::zero();
      for (int64_t j = 0; j < tile.columns; j += V::size) {
        const V weight = exp(V::load(row + j) - maximum);
        total = total + weight;
        weight.store(row + j);
      }
      const Acc shrink = tile.row_shrinks[m];
      totals[first + m] = totals[first + m] * shrink + sum_of(total);
      maxima[first + m] = tile.row_maxima[m];
      if (dropout.p > 0) {
        drop(dropout, tile.image, call.shape.heads + h, first + m, tile.first, tile.count, row);
        V sum = V::zero();
        for (int64_t j = 0; j < tile.columns; j += V::size) sum = sum + V::load(row + j);
        kept[first + m] = kept[first + m] * shrink + sum_of(sum);
      }
      if constexpr (Products<T>::pairs) pair_columns(row, tile.columns);
      if (shrink == Acc{1}) continue;
      Acc* sum = sums + (first + m) * inner;
      const V factor = V::fill(shrink);
      for (int64_t c = 0; c < inner; c += V::size) (V::load(sum + c) * factor).store(sum + c);
    }
    multiply_with<false, V, Product>(rows, inner, depth_of<T>(tile.count), {tile.scores, stride},
        right_of<T>(values, layout.absorbed ? layout.local : layout.head), From<V>{},
        AddedTo<V>{{sums + first * inner, inner}, false});
  }
}

template <typename T>
void prologue(const CoAttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = args.shape.global_tokens, d = args.shape.head_dim, dim = args.shape.dim();
  Scratch<Acc> scratch(memory);
  Acc* y = scratch.take(M * layout.global);
  Acc* qkv = scratch.take(M * layout.head);
  int64_t normalised = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / args.shape.heads, h = task % args.shape.heads;
    if (image != normalised) {
      normalise_rows<V>(call.global(image, 0), M, args.shape.global_width, layout.global,
          static_cast<Acc>(args.eps), call.norm_weight(), call.norm_bias(), y);
      as_left<T>(M, layout.global, y);
      normalised = image;
    }
    multiply_packed<V, T>(M, layout.head, args.shape.global_width, {y, layout.global},
        call.matrix(h, layout.global_qkv), {call.global_qkv_bias(h), 0}, {qkv, layout.head});
    for (int64_t part = 0; args.global_qkv != nullptr && part < 3; ++part) {
      Acc* kept = static_cast<Acc*>(args.global_qkv) + (image * M * 3 + part) * dim + h * d;
      copy_columns(M, d, qkv + part * d, layout.head, kept, 3 * dim);
    }
    meet(call, image, h, qkv, 2);
  }
}

// One head's Q, K and V of the tile without their biases, in T's precision: Q and K transposed.
template <typename T>
void project(const CoCall<T>& call, const CoAttentionForward& args, int64_t h,
    const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionLayout& layout = call.layout;
  const int64_t d = call.shape.head_dim, stride = layout.head;
  const Acc* rows = Products<T>::pairs ? tile.words : tile.tokens;
  multiply_packed<V, T>(tile.count, stride, call.shape.local_width, {rows, layout.local},
      call.matrix(h, layout.local_qkv), {nullptr, 0}, {tile.qkv, stride});
  round_row<V, T>(tile.qkv, tile.count * stride);
  if (args.local_qkv != nullptr) {
    copy_columns(1, tile.count * stride, tile.qkv, 0,
        static_cast<Acc*>(args.local_qkv) + call.kept_offset(tile.image, h, tile.first), 0);
  }
  transpose_tile(call, tile.qkv, stride, tile.count, tile.queries);
  transpose_tile(call, tile.qkv + d, stride, tile.count, tile.keys);
  as_right<T>(tile.queries, layout.depth, tile.columns, layout.tile);
  as_right<T>(tile.keys, layout.depth, tile.columns, layout.tile);
  as_right<T>(tile.qkv + 2 * d, tile.count, layout.dim, stride);
}

template <typename T>
void local(const CoAttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t N = shape.local_tokens, M = shape.global_tokens, Cl = shape.local_width;
  Scratch<Acc> scratch(memory);
  Tile<Acc> tile{};
  tile.tokens = scratch.take(layout.tile * layout.local);
  if (layout.absorbed) tile.transposed = scratch.take(padded(Cl) * layout.tile);
  if constexpr (Products<T>::pairs) tile.words = scratch.take(layout.tile * layout.local);
  const int64_t most_rows = M > CoAttentionLayout::row_block ? M : CoAttentionLayout::row_block;
  tile.scores = scratch.take(most_rows * layout.tile);
  tile.out = scratch.take(layout.tile * layout.local);
  tile.maxima = scratch.take(layout.tile);
  tile.totals = scratch.take(layout.tile);
  tile.row_maxima = scratch.take(CoAttentionLayout::row_block);
  tile.row_shrinks = scratch.take(CoAttentionLayout::row_block);
  if (!layout.absorbed) {
    tile.qkv = scratch.take(layout.tile * layout.head);
    tile.queries = scratch.take(shape.head_dim * layout.tile);
    tile.keys = scratch.take(shape.head_dim * layout.tile);
    tile.heads_out = scratch.take(layout.tile * layout.dim);
  }
  for (int64_t task = begin; task < end; ++task) {
    tile.image = task / layout.chunks;
    const int64_t chunk = task % layout.chunks, chunk_first = chunk * layout.chunk_tokens;
    const int64_t last = smaller(N, chunk_first + layout.chunk_tokens);
    for (int64_t h = 0; h < shape.heads; ++h) {
      Acc* partial = partial_of(call, args, tile.image, chunk, h);
      for (int64_t m = 0; m < layout.rows; ++m) partial[m] = static_cast<Acc>(-1e30);
      for (int64_t i = layout.rows; i < layout.partial; ++i) partial[i] = 0;
    }
    for (tile.first = chunk_first; tile.first < last; tile.first += layout.tile) {
      tile.count = smaller(layout.tile, last - tile.first);
      tile.columns = padded(tile.count);
      load_tile(call, tile.image, tile.first, tile.count, tile.tokens, tile.transposed, tile.words);
      if (layout.absorbed) as_right<T>(tile.tokens, tile.count, layout.local, layout.local);
      for (int64_t h = 0; h < shape.heads; ++h) {
        if (!layout.absorbed) project(call, args, h, tile);
        attend_to_global(call, h, tile);
        attend_to_local(call, h, tile, partial_of(call, args, tile.image, chunk, h));
      }
      const T* x = call.local(tile.image, tile.first);
      T* out = static_cast<T*>(args.local_out) + call.local_offset(tile.image, tile.first);
      for (int64_t i = 0; i < tile.count; ++i) {
        for_each_register<V>(Cl, [&](int64_t c, int64_t n) {
          const V sum = V::load(tile.out + i * layout.local + c);
          store_part(load_part<V>(x + i * Cl + c, n) + sum, out + i * Cl + c, n);
        });
      }
    }
  }
}

// Joins the chunks' shares of a block of global tokens, then projects what they attended to.
template <typename T>
void finish(const CoAttentionForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t M = shape.global_tokens, Cg = shape.global_width, d = shape.head_dim;
  const int64_t inner = layout.inner, dim = shape.dim(), chunks = layout.chunks;
  const int64_t block = layout.finish_rows;
  Scratch<Acc> scratch(memory);
  Acc* sums = scratch.take(block * inner);
  Acc* kept = scratch.take(block);
  Acc* values = scratch.take(block * layout.dim);
  Acc* out = scratch.take(block * layout.global);
  [[maybe_unused]] Acc* pairs = scratch.take(block * dim);
  const Acc keep = static_cast<Acc>(1.0 - args.dropout.p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / layout.row_blocks, first = task % layout.row_blocks * block;
    const int64_t rows = smaller(block, M - first);
    Acc* attended = static_cast<Acc*>(args.attended) + (image * M + first) * dim;
    for (int64_t h = 0; h < shape.heads; ++h) {
      Acc* softmax =
          static_cast<Acc*>(args.global_softmax) + ((image * shape.heads + h) * M + first) * 2;
      for (int64_t m = 0; m < rows; ++m) {
        Acc maximum = partial_of(call, args, image, 0, h)[first + m];
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          const Acc other = partial_of(call, args, image, chunk, h)[first + m];
          maximum = other > maximum ? other : maximum;
        }
        Acc total = 0, total_kept = 0;
        Acc* sum = sums + m * inner;
        for (int64_t c = 0; c < inner; ++c) sum[c] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const Acc* partial = partial_of(call, args, image, chunk, h) + first + m;
          const Acc shrink = exponential(partial[0] - maximum);
          total += partial[layout.rows] * shrink;
          total_kept += partial[2 * layout.rows] * shrink;
          const Acc* from = partial - (first + m) + 3 * layout.rows + (first + m) * inner;
          const V factor = V::fill(shrink);
          for (int64_t c = 0; c < inner; c += V::size) {
            fma(V::load(from + c), factor, V::load(sum + c)).store(sum + c);
          }
        }
        softmax[2 * m] = maximum;
        softmax[2 * m + 1] = total;
        const Acc inverse = Acc{1} / (total * keep);
        kept[m] = args.dropout.p > 0 ? total_kept * inverse : Acc{1};
        const V factor = V::fill(inverse);
        for (int64_t c = 0; c < inner; c += V::size) (V::load(sum + c) * factor).store(sum + c);
      }
      const Acc* from = sums;
      if (layout.absorbed) {
        multiply_packed<V>(rows, layout.dim, shape.local_width, {sums, inner},
            call.matrix(h, layout.to_value), {nullptr, 0}, {values, layout.dim});
        from = values;
      }
      const Acc* bias = call.value_bias(h);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t c = 0; c < d; ++c) {
          attended[m * dim + h * d + c] = from[m * layout.dim + c] + kept[m] * bias[c];
        }
      }
    }
    const Acc* left = attended;
    if constexpr (Products<T>::pairs) {
      copy_columns(rows, dim, attended, dim, pairs, dim);
      for (int64_t m = 0; m < rows; ++m) pair_columns(pairs + m * dim, dim);
      left = pairs;
    }
    multiply_packed<V, T>(rows, layout.global, dim, {left, dim},
        call.packed() + layout.global_proj.offset, {call.global_proj_bias(), 0},
        {out, layout.global});
    const T* residual = call.global(image, first);
    T* to = static_cast<T*>(args.global_out) + call.global_offset(image, first);
    for (int64_t m = 0; m < rows; ++m) {
      for_each_register<V>(Cg, [&](int64_t c, int64_t n) {
        const V sum = V::load(out + m * layout.global + c);
        store_part(load_part<V>(residual + m * Cg + c, n) + sum, to + m * Cg + c, n);
      });
    }
  }
}

template <typename T>
constexpr CoAttentionForwardKernels kernels{
    pack<T, CoAttentionForward>, prologue<T>, local<T>, finish<T>};

}  // namespace

DSNET_DEFINE_KERNELS(CoAttentionForwardKernels, co_attention_forward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
