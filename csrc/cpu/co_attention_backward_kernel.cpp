// Bidirectional co-attention, backward; compiled once per instruction set.
//
// One pass over the local tokens. With the softmaxes' maxima and sums from the forward both
// directions' weights P are complete tile by tile, and with K for dropped ones and the scale of
// kept ones (1 without dropout)
//   dS = P∘(K∘dP − δ),  δ = Σ P∘K∘dP,  which for the global queries is Σ_c dO∘O.
// Of each head a tile meets matrices E of M rows (see CoAttentionLayout): scores and dP are
// E·tileᵀ, gradients of E are dS·tile or (P∘K)·tile, and those of the tile dSᵀ·E and (P∘K)ᵀ·E.
#include "co_attention_backward_global.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// dS and P∘K from scores and dP, for R registers of columns that are softmaxes of their own.
template <typename V, int R, typename Acc = typename V::Acc>
inline void differentiate_columns(int64_t rows, Acc* scores, Acc* grads, int64_t stride,
    const Acc* bias, const Acc* maxima, const Acc* inverses, const Acc* kept) {
  V maximum[R], inverse[R], delta[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    maximum[r] = V::load(maxima + r * V::size);
    inverse[r] = V::load(inverses + r * V::size);
    delta[r] = V::zero();
  }
  for (int64_t first = 0; first < rows; first += sum_block) {
    V part[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = V::zero();
    for (int64_t m = first; m < smaller(first + sum_block, rows); ++m) {
      const V b = V::fill(bias[m]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t at = m * stride + r * V::size;
        const V weight = exp(V::load(scores + at) + b - maximum[r]) * inverse[r];
        V grad = V::load(grads + at);
        if (kept != nullptr) {
          grad = grad * V::load(kept + at);
          grad.store(grads + at);
        }
        part[r] = fma(weight, grad, part[r]);
        weight.store(scores + at);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) delta[r] = delta[r] + part[r];
  }
  for (int64_t m = 0; m < rows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t at = m * stride + r * V::size;
      const V weight = V::load(scores + at);
      (weight * (V::load(grads + at) - delta[r])).store(scores + at);
      (kept == nullptr ? weight : weight * V::load(kept + at)).store(grads + at);
    }
  }
}

// A tile of local tokens and what belongs to it.
template <typename Acc>
struct Tile {
  int64_t image, first, count, columns;
  Acc *tokens, *transposed;     // see load_tile
  Acc *grad, *grad_transposed;  // of the output, the same
  Acc *scores, *grads, *kept;   // (M or row_block, tile)
  Acc *maxima, *inverses;       // (tile)
  Acc* out;                     // (tile, local): gradient of the tokens
  Acc *values, *grad_rows;      // of one head, (d, tile), (tile, dim)
  // Projected, of one head:
  const Acc* qkv;                             // (tile, head)
  Acc *queries, *keys, *grad_heads;           // (d, tile)
  Acc *heads_out, *grad_q, *grad_k, *grad_v;  // (tile, dim)
  Acc* grad_qkv;                              // (tile, head)
};

// Adds a · b, or with `transposed` aᵀ · b, to sums (rows, columns), or stores it. The depth is cut
// into blocks, so that few roundings follow one another.
template <bool transposed, typename V, typename Acc = typename V::Acc>
inline void add_product(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    Matrix<const Acc> b, Acc* sums, bool stores = false) {
  for (int64_t first = 0; first < depth; first += CoAttentionLayout::row_block) {
    const int64_t count = smaller(CoAttentionLayout::row_block, depth - first);
    const Acc* left = a.data + first * (transposed ? a.stride : 1);
    multiply_with<transposed, V>(rows, columns, count, {left, a.stride},
        {b.data + first * b.stride, b.stride}, From<V>{},
        AddedTo<V>{{sums, columns}, stores && first == 0});
  }
}

// Gradients through the attention of the tile's local tokens to the global ones.
template <typename T>
void global_keys(const CoCall<T>& call, int64_t h, const Tile<AccumulatorOf<T>>& tile,
    AccumulatorOf<T>* partial, bool is_first) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = call.shape.global_tokens, N = call.shape.local_tokens;
  const int64_t inner = layout.inner, stride = layout.tile;
  const Acc *keys = call.met(tile.image, h, met_keys),
            *values = call.met(tile.image, h, met_values);
  multiply<false, V>(M, tile.columns, layout.depth, {keys, inner},
      {layout.absorbed ? tile.transposed : tile.queries, stride}, {nullptr, 0},
      {tile.scores, stride});
  multiply<false, V>(M, tile.columns, layout.depth, {values, inner},
      {layout.absorbed ? tile.grad_transposed : tile.grad_heads, stride}, {nullptr, 0},
      {tile.grads, stride});
  const Acc* softmax = static_cast<const Acc*>(call.args.local_softmax) +
                       ((tile.image * call.shape.heads + h) * N + tile.first) * 2;
  for (int64_t i = 0; i < tile.columns; ++i) {
    // Weights behind the last token are 0.
    tile.maxima[i] = i < tile.count ? softmax[2 * i] : static_cast<Acc>(1e30);
    tile.inverses[i] = i < tile.count ? Acc{1} / softmax[2 * i + 1] : Acc{0};
  }
  const AttentionDropout& dropout = call.args.dropout;
  if (dropout.p > 0) {
    const Acc keep = static_cast<Acc>(1.0 / (1.0 - dropout.p));
    for (int64_t i = 0; i < M * stride; ++i) tile.kept[i] = keep;
    drop_columns(dropout, tile.image, h, tile.first, tile.count, M, tile.kept, stride);
  }
  const Acc* bias = call.score_bias(tile.image, h);
  const auto columns = [&](auto R, int64_t j) {
    const Acc* kept = dropout.p > 0 ? tile.kept + j : nullptr;
    differentiate_columns<V, decltype(R)::value>(
        M, tile.scores + j, tile.grads + j, stride, bias, tile.maxima + j, tile.inverses + j, kept);
  };
  int64_t j = 0;
  for (; j + 3 * V::size <= tile.columns; j += 3 * V::size) columns(Constant<3>{}, j);
  for (; j < tile.columns; j += V::size) columns(Constant<1>{}, j);

  const int64_t matrices = layout.absorbed ? 4 : 3;
  Acc *grad_bias = partial + matrices * M * inner,
      *grad_values = partial + (matrices - 1) * M * inner;
  for (int64_t m = 0; m < M; ++m) {
    V sum = V::zero();
    for (j = 0; j < tile.columns; j += V::size) {
      sum = sum + V::load(tile.scores + m * stride + j);
    }
    grad_bias[m] += sum_of(sum);
  }
  if (layout.absorbed) {
    add_product<false, V>(
        M, inner, tile.count, {tile.scores, stride}, {tile.tokens, inner}, partial);
    add_product<false, V>(
        M, inner, tile.count, {tile.grads, stride}, {tile.grad, inner}, grad_values);
    add_product<true, V>(
        tile.count, inner, M, {tile.scores, stride}, {keys, inner}, tile.out, is_first);
    return;
  }
  add_product<false, V>(
      M, inner, tile.count, {tile.scores, stride}, {tile.qkv, layout.head}, partial);
  add_product<false, V>(
      M, inner, tile.count, {tile.grads, stride}, {tile.grad_rows, inner}, grad_values);
  add_product<true, V>(
      tile.count, inner, M, {tile.scores, stride}, {keys, inner}, tile.grad_q, true);
  add_product<true, V>(
      tile.count, inner, M, {tile.grads, stride}, {values, inner}, tile.heads_out, true);
}

// Gradients through the attention of the global tokens to the tile's local ones.
template <typename T>
void local_keys(const CoCall<T>& call, const CoAttentionBackward& args, int64_t h,
    const Tile<AccumulatorOf<T>>& tile, AccumulatorOf<T>* partial) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = call.shape.global_tokens, inner = layout.inner, stride = layout.tile;
  const int64_t index = tile.image * call.shape.heads + h;
  const Acc* softmax = static_cast<const Acc*>(call.args.global_softmax) + index * M * 2;
  const Acc* delta = static_cast<const Acc*>(args.deltas) + index * layout.rows;
  Acc* score_sums = partial + (layout.absorbed ? 4 : 3) * M * inner + layout.rows;
  Acc* kept_sums = score_sums + layout.rows;
  const AttentionDropout& dropout = call.args.dropout;
  const Acc keep = static_cast<Acc>(1.0 / (1.0 - dropout.p));
  const Acc* token_scores = layout.absorbed ? tile.transposed : tile.keys;
  const int64_t dim = call.shape.dim(), d = call.shape.head_dim;
  const Acc* grad_attended =
      static_cast<const Acc*>(args.grad_attended) + tile.image * M * dim + h * d;
  for (int64_t first = 0; first < M; first += CoAttentionLayout::row_block) {
    const int64_t rows = smaller(CoAttentionLayout::row_block, M - first);
    const Acc* queries = call.met(tile.image, h, met_queries) + first * inner;
    const Acc* grad = call.met(tile.image, h, met_grad) + first * inner;
    multiply<false, V>(rows, tile.columns, layout.depth, {queries, inner}, {token_scores, stride},
        {nullptr, 0}, {tile.scores, stride});
    multiply<false, V>(rows, tile.columns, d, {grad_attended + first * dim, dim},
        {tile.values, stride}, {nullptr, 0}, {tile.grads, stride});
    for (int64_t m = 0; m < rows; ++m) {
      Acc *row = tile.scores + m * stride, *row_grad = tile.grads + m * stride;
      const V maximum = V::fill(softmax[2 * (first + m)]);
      const V inverse = V::fill(Acc{1} / softmax[2 * (first + m) + 1]);
      const V mean = V::fill(delta[first + m]);
      if (dropout.p > 0) {
        for (int64_t j = 0; j < tile.columns; ++j) tile.kept[j] = keep;
        drop(dropout, tile.image, call.shape.heads + h, first + m, tile.first, tile.count,
            tile.kept);
      }
      V score_sum = V::zero(), kept_sum = V::zero();
      for (int64_t j = 0; j < tile.columns; j += V::size) {
        V weight = exp(V::load(row + j) - maximum) * inverse;
        if (j + V::size > tile.count) weight = weight.with_rest(tile.count - j, V::zero());
        V score = V::load(row_grad + j);
        if (dropout.p > 0) score = score * V::load(tile.kept + j);
        score = weight * (score - mean);
        if (dropout.p > 0) weight = weight * V::load(tile.kept + j);
        score_sum = score_sum + score;
        kept_sum = kept_sum + weight;
        score.store(row + j);
        weight.store(row_grad + j);
      }
      score_sums[first + m] += sum_of(score_sum);
      kept_sums[first + m] += sum_of(kept_sum);
    }
    Acc* grad_queries = partial + (M + first) * inner;
    const Matrix<const Acc> rows_of_keys = layout.absorbed
                                               ? Matrix<const Acc>{tile.tokens, inner}
                                               : Matrix<const Acc>{tile.qkv + d, layout.head};
    add_product<false, V>(
        rows, inner, tile.count, {tile.scores, stride}, rows_of_keys, grad_queries);
    if (layout.absorbed) {
      add_product<false, V>(rows, inner, tile.count, {tile.grads, stride}, {tile.tokens, inner},
          grad_queries + M * inner);
    }
    const bool begins = first == 0 && !layout.absorbed;
    Acc* grad_k = layout.absorbed ? tile.out : tile.grad_k;
    Acc* grad_v = layout.absorbed ? tile.out : tile.grad_v;
    add_product<true, V>(
        tile.count, inner, rows, {tile.scores, stride}, {queries, inner}, grad_k, begins);
    add_product<true, V>(
        tile.count, inner, rows, {tile.grads, stride}, {grad, inner}, grad_v, begins);
  }
}

// One head's local values with their bias, transposed; projected in the order of terms of the
// forward.
template <typename T>
void put_values(const CoCall<T>& call, int64_t h, const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  const CoAttentionLayout& layout = call.layout;
  if (layout.absorbed) {
    multiply_packed<V>(tile.count, layout.dim, call.shape.local_width, {tile.tokens, layout.local},
        call.matrix(h, layout.to_value), {nullptr, 0}, {tile.grad_rows, layout.dim});
    transpose_tile(call, tile.grad_rows, layout.dim, tile.count, tile.values);
  } else {
    transpose_tile(call, tile.qkv + 2 * call.shape.head_dim, layout.head, tile.count, tile.values);
  }
  for (int64_t c = 0; c < call.shape.head_dim; ++c) {
    const V bias = V::fill(call.value_bias(h)[c]);
    for (int64_t j = 0; j < tile.columns; j += V::size) {
      typename V::Acc* value = tile.values + c * layout.tile + j;
      (V::load(value) + bias).store(value);
    }
  }
}

// One head's queries and keys, transposed, and the gradient of what its queries attended to.
template <typename T>
void put_projected(const CoCall<T>& call, int64_t h, const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  const CoAttentionLayout& layout = call.layout;
  transpose_tile(call, tile.qkv, layout.head, tile.count, tile.queries);
  transpose_tile(call, tile.qkv + call.shape.head_dim, layout.head, tile.count, tile.keys);
  multiply_packed<V>(tile.count, layout.dim, call.shape.local_width, {tile.grad, layout.local},
      call.matrix(h, layout.to_attended), {nullptr, 0}, {tile.grad_rows, layout.dim});
  transpose_tile(call, tile.grad_rows, layout.dim, tile.count, tile.grad_heads);
}

// From the gradients of one head's projections to those of the tokens, and to memory.
template <typename T>
void unproject(const CoCall<T>& call, const CoAttentionBackward& args, int64_t h,
    const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionLayout& layout = call.layout;
  const int64_t d = call.shape.head_dim, dim = call.shape.dim(),
                row = tile.image * call.shape.local_tokens + tile.first;
  Acc* grad_qkv = static_cast<Acc*>(args.grad_local_qkv) + row * 3 * dim + h * d;
  const Acc* parts[3] = {tile.grad_q, tile.grad_k, tile.grad_v};
  for (int64_t part = 0; part < 3; ++part) {
    copy_columns(tile.count, d, parts[part], layout.dim, tile.grad_qkv + part * d, layout.head);
    copy_columns(tile.count, d, parts[part], layout.dim, grad_qkv + part * dim, 3 * dim);
  }
  copy_columns(tile.count, d, tile.heads_out, layout.dim,
      static_cast<Acc*>(args.heads_out) + row * dim + h * d, dim);
  multiply_packed<V>(tile.count, layout.local, 3 * d, {tile.grad_qkv, layout.head},
      call.matrix(h, layout.local_rows), {h > 0 ? tile.out : nullptr, layout.local},
      {tile.out, layout.local});
}

// The output's gradient of a tile: (tile, local) and (Cl, tile), zero behind the last token.
template <typename T>
void load_gradient(
    const CoCall<T>& call, const CoAttentionBackward& args, const Tile<AccumulatorOf<T>>& tile) {
  using V = typename Register<T>::type;
  const CoAttentionLayout& layout = call.layout;
  const int64_t Cl = call.shape.local_width, stride = layout.local;
  const T* grad =
      static_cast<const T*>(args.grad_local) + call.local_offset(tile.image, tile.first);
  for (int64_t i = 0; i < tile.count; ++i) {
    for_each_register<V>(Cl, [&](int64_t c, int64_t n) {
      load_part<V>(grad + i * Cl + c, n).store(tile.grad + i * stride + c);
    });
    for (int64_t c = (Cl + V::size - 1) / V::size * V::size; c < stride; ++c) {
      tile.grad[i * stride + c] = 0;
    }
  }
  for (int64_t i = tile.count * stride; i < tile.columns * stride; ++i) tile.grad[i] = 0;
  if (tile.grad_transposed == nullptr) return;
  transpose(tile.columns, Cl, tile.grad, stride, tile.grad_transposed, layout.tile);
}

// Writes the gradient of the local stream and adds the tile's share of the channels' gradients.
template <typename T>
void store_gradient(const CoCall<T>& call, const CoAttentionBackward& args,
    const Tile<AccumulatorOf<T>>& tile, AccumulatorOf<T>* channels) {
  using V = typename Register<T>::type;
  const int64_t Cl = call.shape.local_width, stride = call.layout.local;
  const int64_t offset = call.local_offset(tile.image, tile.first);
  const T* x = static_cast<const T*>(args.local) + offset;
  T* out = static_cast<T*>(args.grad_local_in) + offset;
  for_each_register<V>(Cl, [&](int64_t c, int64_t n) {
    const V scale = V::load(call.local_scale() + c);
    V sums[3] = {V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < tile.count; ++i) {
      const V grad = V::load(tile.grad + i * stride + c),
              inside = V::load(tile.out + i * stride + c);
      sums[0] = fma(load_part<V>(x + i * Cl + c, n), inside, sums[0]);
      sums[1] = sums[1] + inside;
      sums[2] = sums[2] + grad;
      store_part(fma(inside, scale, grad), out + i * Cl + c, n);
    }
    for (int64_t part = 0; part < 3; ++part) {
      typename V::Acc* to = channels + part * stride + c;
      (V::load(to) + sums[part]).store(to);
    }
  });
}

template <typename T>
void local(const CoAttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t N = shape.local_tokens, M = shape.global_tokens, d = shape.head_dim;
  Scratch<Acc> scratch(memory);
  Tile<Acc> tile{};
  const int64_t most_rows = M > CoAttentionLayout::row_block ? M : CoAttentionLayout::row_block;
  const int64_t of_tokens = layout.tile * layout.local, of_scores = most_rows * layout.tile;
  tile.tokens = scratch.take(of_tokens);
  tile.grad = scratch.take(of_tokens);
  tile.out = scratch.take(of_tokens);
  tile.scores = scratch.take(of_scores);
  tile.grads = scratch.take(of_scores);
  tile.kept = scratch.take(of_scores);
  tile.maxima = scratch.take(layout.tile);
  tile.inverses = scratch.take(layout.tile);
  tile.values = scratch.take(d * layout.tile);
  tile.grad_rows = scratch.take(layout.tile * layout.dim);
  if (layout.absorbed) {
    tile.transposed = scratch.take(padded(shape.local_width) * layout.tile);
    tile.grad_transposed = scratch.take(padded(shape.local_width) * layout.tile);
  } else {
    Acc** const transposed[] = {&tile.queries, &tile.keys, &tile.grad_heads};
    for (Acc** each : transposed) *each = scratch.take(d * layout.tile);
    Acc** const rows[] = {&tile.heads_out, &tile.grad_q, &tile.grad_k, &tile.grad_v};
    for (Acc** each : rows) *each = scratch.take(layout.tile * layout.dim);
    tile.grad_qkv = scratch.take(layout.tile * layout.head);
  }
  for (int64_t task = begin; task < end; ++task) {
    tile.image = task / layout.chunks;
    const int64_t chunk = task % layout.chunks, chunk_first = chunk * layout.chunk_tokens;
    const int64_t last = smaller(N, chunk_first + layout.chunk_tokens);
    Acc* partials = partial_of(call, args, tile.image, chunk, 0);
    for (int64_t i = 0; i < shape.heads * layout.grad_partial; ++i) partials[i] = 0;
    Acc* channels = static_cast<Acc*>(args.channel_partials) + task * 3 * layout.local;
    for (int64_t i = 0; i < 3 * layout.local; ++i) channels[i] = 0;
    for (tile.first = chunk_first; tile.first < last; tile.first += layout.tile) {
      tile.count = smaller(layout.tile, last - tile.first);
      tile.columns = padded(tile.count);
      load_tile(call, tile.image, tile.first, tile.count, tile.tokens, tile.transposed);
      load_gradient(call, args, tile);
      for (int64_t h = 0; h < shape.heads; ++h) {
        if (!layout.absorbed) {
          tile.qkv =
              static_cast<const Acc*>(args.local_qkv) + call.kept_offset(tile.image, h, tile.first);
        }
        put_values(call, h, tile);
        if (!layout.absorbed) put_projected(call, h, tile);
        Acc* partial = partial_of(call, args, tile.image, chunk, h);
        global_keys(call, h, tile, partial, h == 0);
        local_keys(call, args, h, tile, partial);
        if (!layout.absorbed) unproject(call, args, h, tile);
      }
      store_gradient(call, args, tile, channels);
      if (layout.absorbed) continue;
      copy_columns(tile.count, layout.local, tile.tokens, layout.local,
          static_cast<Acc*>(args.tokens) + (tile.image * N + tile.first) * layout.local,
          layout.local);
    }
  }
}

template <typename T>
constexpr CoAttentionBackwardKernels kernels{
    pack<T, CoAttentionBackward>, prologue<T>, local<T>, heads<T>, finish<T>, weights<T>};

}  // namespace

DSNET_DEFINE_KERNELS(CoAttentionBackwardKernels, co_attention_backward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
