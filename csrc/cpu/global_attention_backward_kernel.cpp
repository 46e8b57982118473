// Global self-attention, backward; compiled once per instruction set.
//
// With P the attention weights, recomputed from the scores and the saved logarithms of their sums,
// and dropped ones and the scale of kept ones in K (1 without dropout), for one head:
//   dV = (P∘K)ᵀ·dO    dP = K∘(dO·Vᵀ)    dS = P∘(dP − Σ_j P∘dP)/√d    dQ = dS·K    dK = dSᵀ·Q
// Then over all heads dy = [dQ, dK, dV]·W, dW = [dQ, dK, dV]ᵀ·y, and the LayerNorm's gradient.
#include "global_attention_projection.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// The weights in panels of columns, in their own order of rows.
template <typename T, typename Source>
void pack_rows_from(
    const AttentionBackward& args, const Source* weight, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Call<T> call(args);
  const int64_t C = args.shape.width(), rows = 3 * C;
  constexpr int64_t group = AttentionBackwardLayout::panel;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t last = smaller((task + 1) * group, call.layout.width);
    for (int64_t first = task * group; first < last; first += tile_columns<V>) {
      const int64_t columns = smaller(tile_columns<V>, last - first);
      const int64_t inside = smaller(columns, C - first);
      Acc* panel = static_cast<Acc*>(args.packed_rows) + first * rows;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += V::size) {
          const int64_t n = smaller(V::size, inside - j);
          const V part = n > 0 ? load_part<V>(weight + i * C + first + j, n) : V::zero();
          part.store(panel + i * columns + j);
        }
      }
    }
  }
}

template <typename T>
void pack_rows(const AttentionBackward& args, void*, int64_t begin, int64_t end) {
  if (args.qkv_weight.is_accumulator) {
    const auto* weight = static_cast<const AccumulatorOf<T>*>(args.qkv_weight.data);
    pack_rows_from<T>(args, weight, begin, end);
  } else {
    pack_rows_from<T>(args, static_cast<const T*>(args.qkv_weight.data), begin, end);
  }
}

// One head's matrices: of all tokens [Q, K, V], K and V transposed, and the output's gradient.
template <typename Acc>
struct Head {
  int64_t image, head;
  Acc* qkv;
  Acc* keys;
  Acc* values;
  Acc* grad;
};

// Attention weights and score gradients of queries [begin, begin + rows): `weights` becomes P∘K,
// `scores` becomes dS.
template <typename T>
void differentiate_rows(const Call<T>& call, const AttentionBackward& args,
    const Head<AccumulatorOf<T>>& of, int64_t begin, int64_t rows, AccumulatorOf<T>* weights,
    AccumulatorOf<T>* scores, AccumulatorOf<T>* kept) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const AttentionLayout& layout = call.layout;
  const int64_t M = call.shape.tokens, d = call.shape.head_dim, stride = layout.keys;
  multiply<false, V>(rows, stride, d, {of.qkv + begin * layout.head, layout.head},
      {of.keys, stride}, {nullptr, 0}, {weights, stride});
  multiply<false, V>(rows, stride, d, {of.grad + begin * layout.dim, layout.dim},
      {of.values, stride}, {nullptr, 0}, {scores, stride});

  const Acc* lse =
      static_cast<const Acc*>(args.lse) + (of.image * call.shape.heads + of.head) * M + begin;
  const V scale = V::fill(call.scale);
  const bool drops = args.dropout.p > 0;
  const Acc keep = static_cast<Acc>(1.0 / (1.0 - args.dropout.p));
  for (int64_t i = 0; i < rows; ++i) {
    Acc* p = weights + i * stride;
    Acc* ds = scores + i * stride;
    // Behind the last key 0 − lse may be anything; P is 0 there.
    fill_rest<V>(p, M, stride, Acc{0});
    const V shift = V::fill(-lse[i]);
    V total = V::zero(), delta = V::zero();
    for (int64_t j = 0; j < stride; j += V::size) {
      V weight = exp(fma(V::load(p + j), scale, shift));
      if (j + V::size > M) weight = weight.with_rest(M - j > 0 ? M - j : 0, V::zero());
      total = total + weight;
      weight.store(p + j);
    }
    if (drops) {
      for (int64_t j = 0; j < M; ++j) kept[j] = keep;
      for (int64_t j = M; j < stride; ++j) kept[j] = 0;
      drop(args.dropout, of.image, of.head, begin + i, 0, M, kept);
    }
    // The sum is 1 but for the rounding of lse, which would not cancel in dS.
    const V sum = V::fill(sum_of(total));
    for (int64_t j = 0; j < stride; j += V::size) {
      const V weight = V::load(p + j) / sum;
      V gradient = V::load(ds + j);
      if (drops) {
        gradient = gradient * V::load(kept + j);
        gradient.store(ds + j);
      }
      delta = fma(weight, gradient, delta);
      weight.store(p + j);
    }
    const V mean = V::fill(sum_of(delta));
    for (int64_t j = 0; j < stride; j += V::size) {
      const V weight = V::load(p + j);
      (weight * (V::load(ds + j) - mean) * scale).store(ds + j);
      if (drops) (weight * V::load(kept + j)).store(p + j);
    }
  }
}

// Gradients of Q, K and V of one head, from a split of its queries.
template <typename T>
void heads(const AttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Call<T> call(args);
  const AttentionLayout& layout = call.layout;
  const AttentionBackwardLayout& cut = args.cut;
  const int64_t M = args.shape.tokens, d = args.shape.head_dim, C = args.shape.width();
  Scratch<Acc> scratch(memory);
  Acc* weights = scratch.take(cut.query_block * layout.keys);
  Acc* scores = scratch.take(cut.query_block * layout.keys);
  Acc* kept = scratch.take(layout.keys);
  Acc* grad_q = scratch.take(cut.query_block * layout.dim);
  Acc* grad_k = scratch.take(M * layout.dim);
  Acc* grad_v = scratch.take(M * layout.dim);
  Head<Acc> of{};
  of.grad = scratch.take(M * layout.dim);
  if (layout.is_few) {
    of.qkv = scratch.take(M * layout.head);
    of.keys = scratch.take(d * layout.keys);
    of.values = scratch.take(d * layout.keys);
    clear_padding(call, of.keys);
    clear_padding(call, of.values);
  }

  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % cut.splits, index = task / cut.splits;
    of.image = index / args.shape.heads;
    of.head = index % args.shape.heads;
    if (layout.is_few) {
      const Acc* y = static_cast<const Acc*>(args.y) + of.image * M * layout.width;
      project_head(call, of.head, M, y, of.qkv);
      transpose(M, d, of.qkv + d, layout.head, of.keys, layout.keys);
      transpose(M, d, of.qkv + 2 * d, layout.head, of.values, layout.keys);
    } else {
      of.qkv = qkv_of(call, of.image, of.head);
      of.keys = transposed_of(call, args.keys, of.image, of.head);
      of.values = transposed_of(call, args.values, of.image, of.head);
    }
    const int64_t first = split * cut.split_blocks * cut.query_block;
    const int64_t last = smaller(M, first + cut.split_blocks * cut.query_block);
    const T* grad = static_cast<const T*>(args.grad) + of.image * M * C + of.head * d;
    for (int64_t i = first; i < last; ++i) {
      for_each_register<V>(d, [&](int64_t c, int64_t n) {
        load_part<V>(grad + i * C + c, n).store(of.grad + i * layout.dim + c);
      });
    }

    Acc* out = static_cast<Acc*>(args.grad_qkv) + of.image * M * 3 * C + of.head * d;
    for (int64_t i = first; i < last; i += cut.query_block) {
      const int64_t rows = smaller(cut.query_block, last - i);
      differentiate_rows(call, args, of, i, rows, weights, scores, kept);
      const Start<Acc> start_k{i > first ? grad_k : nullptr, layout.dim};
      const Start<Acc> start_v{i > first ? grad_v : nullptr, layout.dim};
      multiply<true, V>(M, layout.dim, rows, {scores, layout.keys},
          {of.qkv + i * layout.head, layout.head}, start_k, {grad_k, layout.dim});
      multiply<true, V>(M, layout.dim, rows, {weights, layout.keys},
          {of.grad + i * layout.dim, layout.dim}, start_v, {grad_v, layout.dim});
      multiply<false, V>(rows, layout.dim, M, {scores, layout.keys}, {of.qkv + d, layout.head},
          {nullptr, 0}, {grad_q, layout.dim});
      copy_columns(rows, d, grad_q, layout.dim, out + i * 3 * C, 3 * C);
    }
    if (cut.splits == 1) {
      copy_columns(M, d, grad_k, layout.dim, out + C, 3 * C);
      copy_columns(M, d, grad_v, layout.dim, out + 2 * C, 3 * C);
    } else {
      Acc* partial = static_cast<Acc*>(args.partials) + task * 2 * M * d;
      copy_columns(M, d, grad_k, layout.dim, partial, d);
      copy_columns(M, d, grad_v, layout.dim, partial + M * d, d);
    }
  }
}

// Sums the splits' gradients of K and V for one token, in order.
template <typename T>
void add_splits(
    const Call<T>& call, const AttentionBackward& args, int64_t token, AccumulatorOf<T>* grad_qkv) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t M = args.shape.tokens, d = args.shape.head_dim, h = args.shape.heads;
  const int64_t image = token / M, row = token % M, splits = args.cut.splits;
  for (int64_t head = 0; head < h; ++head) {
    for (int64_t part = 0; part < 2; ++part) {
      const Acc* from = static_cast<const Acc*>(args.partials) +
                        (image * h + head) * splits * 2 * M * d + (part * M + row) * d;
      Acc* to = grad_qkv + (1 + part) * call.shape.width() + head * d;
      for_each_register<V>(d, [&](int64_t c, int64_t n) {
        V sum = load_part<V>(from + c, n);
        for (int64_t split = 1; split < splits; ++split) {
          sum = sum + load_part<V>(from + split * 2 * M * d + c, n);
        }
        store_part(sum, to + c, n);
      });
    }
  }
}

// Gradients of a block of tokens, and the block's share of those of the norm.
template <typename T>
void tokens(const AttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Call<T> call(args);
  const int64_t C = args.shape.width(), width = call.layout.width;
  const int64_t all = args.shape.batch * args.shape.tokens;
  Scratch<Acc> scratch(memory);
  Acc* grad_y = scratch.take(AttentionBackwardLayout::token_block * width);
  const Acc* weight = call.packed();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * AttentionBackwardLayout::token_block;
    const int64_t count = smaller(AttentionBackwardLayout::token_block, all - first);
    Acc* grad_qkv = static_cast<Acc*>(args.grad_qkv) + first * 3 * C;
    if (args.cut.splits > 1) {
      for (int64_t i = 0; i < count; ++i) {
        add_splits(call, args, first + i, grad_qkv + i * 3 * C);
      }
    }
    for (int64_t j = 0; j < width; j += tile_columns<V>) {
      // A panel ends where a group of them does.
      const int64_t columns = smaller(tile_columns<V>, width - j);
      const Acc* panel = static_cast<const Acc*>(args.packed_rows) + j * 3 * C;
      multiply<false, V>(count, columns, 3 * C, {grad_qkv, 3 * C}, {panel, columns}, {nullptr, 0},
          {grad_y + j, width});
    }

    Acc* grad_weight = static_cast<Acc*>(args.norm_partials) + task * 2 * width;
    Acc* grad_bias = grad_weight + width;
    for (int64_t c = 0; c < 2 * width; ++c) grad_weight[c] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Moments<Acc> moments = static_cast<const Moments<Acc>*>(args.moments)[first + i];
      const int64_t offset = (first + i) * C;
      normalise_gradient<V>(static_cast<const T*>(args.x) + offset,
          static_cast<const T*>(args.grad) + offset, C, moments, weight, grad_y + i * width,
          grad_weight, grad_bias, static_cast<T*>(args.grad_x) + offset);
    }
  }
}

// Rows of the weight's gradient: products over all tokens, some at a time.
template <typename T>
void weights(const AttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  using Layout = AttentionBackwardLayout;
  const Call<T> call(args);
  const int64_t C = args.shape.width(), width = call.layout.width;
  const int64_t all = args.shape.batch * args.shape.tokens;
  Scratch<Acc> scratch(memory);
  Acc* columns = scratch.take(Layout::weight_depth * Layout::weight_block);
  Acc* sums = scratch.take(Layout::weight_block * width);
  Acc* part = scratch.take(Layout::weight_block * width);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task * Layout::weight_block;
    const int64_t rows = smaller(Layout::weight_block, 3 * C - row);
    double bias[Layout::weight_block] = {};
    for (int64_t first = 0; first < all; first += Layout::weight_depth) {
      const int64_t depth = smaller(Layout::weight_depth, all - first);
      const Acc* grad_qkv = static_cast<const Acc*>(args.grad_qkv) + first * 3 * C + row;
      for (int64_t t0 = 0; t0 < depth; t0 += 32) {
        Acc part_of_bias[Layout::weight_block] = {};
        for (int64_t t = t0; t < smaller(t0 + 32, depth); ++t) {
          for (int64_t i = 0; i < rows; ++i) {
            const Acc value = grad_qkv[t * 3 * C + i];
            columns[t * Layout::weight_block + i] = value;
            part_of_bias[i] += value;
          }
        }
        for (int64_t i = 0; i < rows; ++i) bias[i] += static_cast<double>(part_of_bias[i]);
      }
      const Acc* y = static_cast<const Acc*>(args.y) + first * width;
      multiply<true, V>(rows, width, depth, {columns, Layout::weight_block}, {y, width},
          {nullptr, 0}, {first > 0 ? part : sums, width});
      if (first == 0) continue;
      for (int64_t c = 0; c < rows * width; c += V::size) {
        (V::load(sums + c) + V::load(part + c)).store(sums + c);
      }
    }
    copy_columns(rows, C, sums, width, static_cast<Acc*>(args.grad_qkv_weight) + row * C, C);
    for (int64_t i = 0; i < rows; ++i) {
      static_cast<Acc*>(args.grad_qkv_bias)[row + i] = static_cast<Acc>(bias[i]);
    }
  }
}

template <typename T>
constexpr AttentionBackwardKernels kernels{
    pack<T>, pack_rows<T>, project<T>, heads<T>, tokens<T>, weights<T>};

}  // namespace

DSNET_DEFINE_KERNELS(AttentionBackwardKernels, global_attention_backward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
