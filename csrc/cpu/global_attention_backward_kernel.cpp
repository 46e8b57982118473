// Global self-attention, backward; compiled once per instruction set.
//
// With P the attention weights, recomputed from the kept [Q, K, V] and the saved logarithms of
// their sums, and dropped ones and the scale of kept ones in K (1 without dropout), for one head:
//   dV = (P∘K)ᵀ·dO    dP = K∘(dO·Vᵀ)    dS = P∘(dP − Σ_j P∘dP)/√d    dQ = dS·K    dK = dSᵀ·Q
// Then over all heads dy = [dQ, dK, dV]·W, dW = [dQ, dK, dV]ᵀ·y, and the LayerNorm's gradient.
#include "global_attention_steps.h"
#include "storages.h"
#include "token_product_steps.h"

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

// A task for each group of panels, and one for the norm.
template <typename T>
void pack(const AttentionBackward& args, void*, int64_t begin, int64_t end) {
  if (end > args.cut.panels) pack_norm(Call<T>(args));
  end = smaller(end, args.cut.panels);
  if (args.qkv_weight.is_accumulator) {
    const auto* weight = static_cast<const AccumulatorOf<T>*>(args.qkv_weight.data);
    pack_rows_from<T>(args, weight, begin, end);
  } else {
    pack_rows_from<T>(args, static_cast<const T*>(args.qkv_weight.data), begin, end);
  }
}

// Normalises a block of tokens and, where they are many, transposes its keys and values.
template <typename T>
void normalise(const AttentionBackward& args, void*, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const Call<T> call(args);
  const AttentionLayout& layout = call.layout;
  const int64_t M = args.shape.tokens, d = args.shape.head_dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / layout.token_blocks;
    const int64_t first = task % layout.token_blocks * AttentionLayout::token_block;
    const int64_t count = smaller(AttentionLayout::token_block, M - first);
    const int64_t row = image * M + first;
    normalise_tokens(call, image, first, count, static_cast<Acc*>(args.y) + row * layout.width,
        static_cast<Moments<Acc>*>(args.moments) + row);
    for (int64_t head = 0; !layout.is_few && head < args.shape.heads; ++head) {
      const Acc* qkv =
          static_cast<const Acc*>(args.qkv) + call.qkv_offset(image, head) + first * layout.head;
      void* const parts[] = {args.keys, args.values};
      for (int part = 0; part < 2; ++part) {
        Acc* transposed = static_cast<Acc*>(parts[part]) + call.keys_offset(image, head);
        transpose(count, d, qkv + (1 + part) * d, layout.head, transposed + first, layout.keys);
        if (first + count == M) clear_padding(call, transposed);
      }
    }
  }
}

// One head's matrices: of all tokens [Q, K, V], K and V transposed, and the output's gradient.
template <typename Acc>
struct Head {
  int64_t image, head;
  const Acc* qkv;
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
    of.keys = scratch.take(d * layout.keys);
    of.values = scratch.take(d * layout.keys);
    clear_padding(call, of.keys);
    clear_padding(call, of.values);
  }

  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % cut.splits, index = task / cut.splits;
    of.image = index / args.shape.heads;
    of.head = index % args.shape.heads;
    of.qkv = static_cast<const Acc*>(args.qkv) + call.qkv_offset(of.image, of.head);
    if (layout.is_few) {
      transpose(M, d, of.qkv + d, layout.head, of.keys, layout.keys);
      transpose(M, d, of.qkv + 2 * d, layout.head, of.values, layout.keys);
    } else {
      const int64_t offset = call.keys_offset(of.image, of.head);
      of.keys = static_cast<Acc*>(args.keys) + offset;
      of.values = static_cast<Acc*>(args.values) + offset;
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

template <typename T>
constexpr AttentionBackwardKernels kernels{
    pack<T>, normalise<T>, heads<T>, tokens<T>, token_product<T>};

}  // namespace

DSNET_DEFINE_KERNELS(AttentionBackwardKernels, global_attention_backward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
