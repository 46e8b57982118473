// What forward and backward of co-attention share: packed weights, and what local tokens meet.
#pragma once

#include "attention_steps.h"
#include "co_attention.h"
#include "panels.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Terms of a sum over global tokens that are added one after the other: of more, each such block
// has a sum of its own.
constexpr int64_t sum_block = 64;

// A call's memory with its types.
template <typename T>
struct CoCall {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionCall& args;
  const CoAttentionShape& shape;
  const CoAttentionLayout& layout;
  Acc scale;

  explicit CoCall(const CoAttentionCall& a)
      : args(a),
        shape(a.shape),
        layout(a.layout),
        scale(Acc{1} / square_root(static_cast<Acc>(a.shape.head_dim))) {}

  Acc* packed() const { return static_cast<Acc*>(args.packed); }
  Acc* norm_weight() const { return packed(); }
  Acc* norm_bias() const { return packed() + layout.global; }
  Acc* global_proj_bias() const { return packed() + 2 * layout.global; }
  Acc* local_scale() const { return packed() + 3 * layout.global; }
  Acc* local_shift() const { return local_scale() + layout.local; }
  Acc* local_proj_bias() const { return local_scale() + 2 * layout.local; }

  Acc* head(int64_t h) const { return packed() + layout.vectors + h * layout.head_size; }
  Acc* global_qkv_bias(int64_t h) const { return head(h); }
  Acc* query_bias(int64_t h) const { return head(h) + layout.head; }
  Acc* value_bias(int64_t h) const { return head(h) + layout.head + layout.dim; }
  Acc* matrix(int64_t h, const PackedMatrix& of) const { return head(h) + of.offset; }

  // What local tokens meet; see CoAttentionLayout.
  Acc* met(int64_t image, int64_t h, int64_t index) const {
    return static_cast<Acc*>(args.met) + (image * shape.heads + h) * layout.met +
           index * shape.global_tokens * layout.inner;
  }
  Acc* score_bias(int64_t image, int64_t h) const { return met(image, h, layout.met_matrices); }

  int64_t local_offset(int64_t image, int64_t token) const {
    return (image * shape.local_tokens + token) * shape.local_width;
  }
  int64_t global_offset(int64_t image, int64_t token) const {
    return (image * shape.global_tokens + token) * shape.global_width;
  }
  // Where the kept [Q, K, V] of a local token and a head lie.
  int64_t kept_offset(int64_t image, int64_t h, int64_t token) const {
    return ((image * shape.heads + h) * shape.local_tokens + token) * layout.head;
  }
  const T* local(int64_t image, int64_t token) const {
    return static_cast<const T*>(args.local) + local_offset(image, token);
  }
  const T* global(int64_t image, int64_t token) const {
    return static_cast<const T*>(args.global) + global_offset(image, token);
  }
};

template <typename T, typename Body>
inline void with_values(const Parameter& parameter, const Body& body) {
  if (parameter.is_accumulator) {
    body(static_cast<const AccumulatorOf<T>*>(parameter.data));
  } else {
    body(static_cast<const T*>(parameter.data));
  }
}

// The values of a vector from `first` on, then zeros; `absent` where there is none.
template <typename T, typename Acc = AccumulatorOf<T>>
inline void copy_vector(const Parameter& parameter, int64_t first, int64_t count,
    int64_t padded_count, Acc absent, Acc* to) {
  for (int64_t i = 0; i < padded_count; ++i) {
    const Acc value = parameter.data == nullptr ? absent : Acc{0};
    to[i] = i >= count                  ? Acc{0}
            : parameter.data == nullptr ? value
                                        : value_at<T, Acc>(parameter, first + i);
  }
}

// Values as activations hold them.
template <typename V, typename T>
inline V rounded_as(V value) {
  if constexpr (is_float<T>) {
    return value;
  } else {
    T narrow[V::size];
    value.store(narrow);
    return V::load(narrow);
  }
}

template <typename V, typename T, typename Acc = typename V::Acc>
inline void round_row(Acc* row, int64_t n) {
  if constexpr (is_float<T>) return;
  for (int64_t c = 0; c < n; c += V::size) rounded_as<V, T>(V::load(row + c)).store(row + c);
}

// Rows of a left side in T's precision, as its products take them; rows of whole registers.
template <typename T, typename Acc = AccumulatorOf<T>>
inline void as_left(int64_t rows, int64_t stride, Acc* left) {
  for (int64_t i = 0; i < rows; ++i) {
    round_row<typename Register<T>::type, T>(left + i * stride, stride);
    if constexpr (Products<T>::pairs) pair_columns(left + i * stride, stride);
  }
}

// A packed right side in T's precision, as its products take it.
template <typename T, typename Acc = AccumulatorOf<T>>
inline void as_packed(const PackedMatrix& matrix, Acc* packed) {
  using V = typename Register<T>::type;
  if constexpr (Products<T>::pairs) {
    pair_panels<V, T>(matrix.depth, matrix.columns, packed);
  } else {
    round_row<V, T>(packed, matrix.depth * matrix.columns);
  }
}

template <typename T>
inline void pack_head(const CoCall<T>& call, int64_t h) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionCall& args = call.args;
  const CoAttentionLayout& layout = call.layout;
  const int64_t Cl = call.shape.local_width, Cg = call.shape.global_width;
  const int64_t d = call.shape.head_dim, dim = call.shape.dim();
  for (int64_t part = 0; part < 3; ++part) {
    copy_vector<T>(args.global_qkv_bias, part * dim + h * d, d, part == 2 ? layout.head - 2 * d : d,
        Acc{0}, call.global_qkv_bias(h) + part * d);
  }
  copy_vector<T>(args.local_qkv_bias, h * d, d, layout.dim, Acc{0}, call.query_bias(h));
  copy_vector<T>(args.local_qkv_bias, 2 * dim + h * d, d, layout.dim, Acc{0}, call.value_bias(h));
  if (layout.global_qkv.depth > 0) {
    with_values<T>(args.global_qkv_weight, [&](const auto* weight) {
      pack_segments<V>(
          weight + h * d * Cg, Cg, 3, dim, d, Cg, layout.head, call.matrix(h, layout.global_qkv));
    });
    as_packed<T>(layout.global_qkv, call.matrix(h, layout.global_qkv));
  }
  with_values<T>(args.local_qkv_weight, [&](const auto* weight) {
    const auto natural = [&](const PackedMatrix& to, int64_t part) {
      if (to.depth == 0) return;
      pack_panels<V, false>(
          weight + (part * dim + h * d) * Cl, Cl, Cl, d, layout.local, call.matrix(h, to));
    };
    const auto transposed = [&](const PackedMatrix& to, int64_t part) {
      if (to.depth == 0) return;
      pack_panels<V, true>(
          weight + (part * dim + h * d) * Cl, Cl, d, Cl, layout.dim, call.matrix(h, to));
    };
    natural(layout.query, 0);
    natural(layout.key, 1);
    natural(layout.value, 2);
    transposed(layout.to_query, 0);
    transposed(layout.to_key, 1);
    transposed(layout.to_value, 2);
    if (layout.local_qkv.depth > 0) {
      pack_segments<V>(
          weight + h * d * Cl, Cl, 3, dim, d, Cl, layout.head, call.matrix(h, layout.local_qkv));
      as_packed<T>(layout.local_qkv, call.matrix(h, layout.local_qkv));
    }
    if (layout.local_rows.depth > 0) {
      const auto row = [&](int64_t k) { return weight + (k / d * dim + h * d + k % d) * Cl; };
      pack_rows<V>(row, Cl, 3 * d, layout.local, call.matrix(h, layout.local_rows));
    }
  });
  with_values<T>(args.local_proj_weight, [&](const auto* weight) {
    if (layout.proj.depth > 0) {
      pack_panels<V, true>(weight + h * d, dim, Cl, d, layout.local, call.matrix(h, layout.proj));
      if (!layout.absorbed) as_packed<T>(layout.proj, call.matrix(h, layout.proj));
    }
    if (layout.to_attended.depth > 0) {
      pack_panels<V, false>(
          weight + h * d, dim, d, Cl, layout.dim, call.matrix(h, layout.to_attended));
    }
  });
  if (layout.global_attended.depth > 0) {
    with_values<T>(args.global_proj_weight, [&](const auto* weight) {
      pack_panels<V, false>(
          weight + h * d, dim, d, Cg, layout.dim, call.matrix(h, layout.global_attended));
    });
  }
}

// Task `head` packs the weights of that head, task h what all heads share.
template <typename T, typename Arguments>
void pack(const Arguments& args, void*, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const int64_t Cl = args.shape.local_width, Cg = args.shape.global_width, dim = args.shape.dim();
  for (int64_t task = begin; task < end; ++task) {
    if (task < args.shape.heads) {
      pack_head(call, task);
      continue;
    }
    copy_vector<T>(args.norm_weight, 0, Cg, layout.global, Acc{0}, call.norm_weight());
    copy_vector<T>(args.norm_bias, 0, Cg, layout.global, Acc{0}, call.norm_bias());
    copy_vector<T>(args.global_proj_bias, 0, Cg, layout.global, Acc{0}, call.global_proj_bias());
    copy_vector<T>(args.local_scale, 0, Cl, layout.local, Acc{1}, call.local_scale());
    copy_vector<T>(args.local_shift, 0, Cl, layout.local, Acc{0}, call.local_shift());
    copy_vector<T>(args.local_proj_bias, 0, Cl, layout.local, Acc{0}, call.local_proj_bias());
    if (layout.global_proj.depth > 0) {
      with_values<T>(args.global_proj_weight, [&](const auto* weight) {
        pack_panels<V, true>(
            weight, dim, Cg, dim, layout.global, call.packed() + layout.global_proj.offset);
      });
      as_packed<T>(layout.global_proj, call.packed() + layout.global_proj.offset);
    }
    if (layout.global_rows.depth > 0) {
      with_values<T>(args.global_qkv_weight, [&](const auto* weight) {
        pack_panels<V, false>(
            weight, Cg, Cg, 3 * dim, layout.global, call.packed() + layout.global_rows.offset);
      });
    }
  }
}

// Rows of a right side (depth, columns) as T's product takes them, and their stride.
template <typename T, typename Acc = AccumulatorOf<T>>
inline Matrix<const Acc> as_right(Acc* rows, int64_t depth, int64_t columns, int64_t stride) {
  if constexpr (Products<T>::pairs) {
    for (int64_t k = 0; k < depth; k += 2) {
      pair_rows(rows + k * stride, k + 1 < depth ? rows + (k + 1) * stride : nullptr, columns);
    }
    return {rows, 2 * stride};
  }
  return {rows, stride};
}

template <typename T, typename Acc = AccumulatorOf<T>>
inline Matrix<const Acc> right_of(const Acc* rows, int64_t stride) {
  return {rows, Products<T>::pairs ? 2 * stride : stride};
}

// Local tokens [first, first + count) of an image after the affine, in T's precision: (columns,
// layout.local), and their transpose (Cl, layout.tile), which may be null; zero behind the last
// one. Of pairs, the transpose and `words`, which is needed then alone, hold words.
template <typename T>
void load_tile(const CoCall<T>& call, int64_t image, int64_t first, int64_t count,
    AccumulatorOf<T>* tokens, AccumulatorOf<T>* transposed, AccumulatorOf<T>* words = nullptr) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t Cl = call.shape.local_width, stride = call.layout.local, columns = padded(count);
  const Acc *scale = call.local_scale(), *shift = call.local_shift();
  const T* x = call.local(image, first);
  for (int64_t i = 0; i < count; ++i) {
    Acc* row = tokens + i * stride;
    int64_t c = 0;
    for_each_register<V>(Cl, [&](int64_t at, int64_t n) {
      // Scale and shift are 0 behind the last channel.
      const V value =
          fma(load_part<V>(x + i * Cl + at, n), V::load(scale + at), V::load(shift + at));
      rounded_as<V, T>(value).store(row + at);
      c = at + V::size;
    });
    for (; c < stride; ++c) row[c] = 0;
  }
  for (int64_t i = count * stride; i < columns * stride; ++i) tokens[i] = 0;
  if constexpr (Products<T>::pairs) {
    for (int64_t i = 0; i < columns; ++i) {
      copy_columns(1, stride, tokens + i * stride, stride, words + i * stride, stride);
      pair_columns(words + i * stride, stride);
    }
  }
  if (transposed == nullptr) return;
  const Acc* rows = Products<T>::pairs ? words : tokens;
  transpose(columns, depth_of<T>(Cl), rows, stride, transposed, call.layout.tile);
}

// The transpose (d, layout.tile) of `count` rows of one head, zero behind the last one.
template <typename T>
void transpose_tile(const CoCall<T>& call, const AccumulatorOf<T>* rows, int64_t stride,
    int64_t count, AccumulatorOf<T>* to) {
  const int64_t d = call.shape.head_dim, tile = call.layout.tile;
  transpose(count, d, rows, stride, to, tile);
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t i = count; i < padded(count); ++i) to[c * tile + i] = 0;
  }
}

// What the local tokens of an image meet of one head:
//   absorbed   K_g·W_q/√d, Q_g·W_k/√d, V_g·W_projᵀ (M, Cl)    projected  K_g/√d, Q_g/√d, V_g (M, d)
// and the bias of the scores K_g·b_q/√d. `qkv` (M, layout.head), of which [Q_g, K_g, V_g] are
// given, becomes Q_g/√d, K_g/√d and V_g.
template <typename T>
void meet(
    const CoCall<T>& call, int64_t image, int64_t h, AccumulatorOf<T>* qkv, int64_t values_index) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoAttentionLayout& layout = call.layout;
  const int64_t M = call.shape.global_tokens, d = call.shape.head_dim, inner = layout.inner;
  Acc *keys = call.met(image, h, 0), *queries = call.met(image, h, 1);
  Acc *values = call.met(image, h, values_index), *bias = call.score_bias(image, h);
  const Acc* query_bias = call.query_bias(h);
  const V scale = V::fill(call.scale);
  for (int64_t m = 0; m < M; ++m) {
    Acc* row = qkv + m * layout.head;
    V sum = V::zero();
    for_each_register<V>(2 * d,
        [&](int64_t c, int64_t n) { store_part(load_part<V>(row + c, n) * scale, row + c, n); });
    for_each_register<V>(d, [&](int64_t c, int64_t n) {
      sum = fma(load_part<V>(row + d + c, n), load_part<V>(query_bias + c, n), sum);
    });
    bias[m] = sum_of(sum);
  }
  for (int64_t m = M; m < layout.rows; ++m) bias[m] = 0;
  const Acc* parts[] = {qkv + d, qkv, qkv + 2 * d};
  Acc* const to[] = {keys, queries, values};
  const PackedMatrix* const matrices[] = {&layout.query, &layout.key, &layout.proj};
  for (int part = 0; part < 3; ++part) {
    if (layout.absorbed) {
      multiply_packed<V>(M, inner, d, {parts[part], layout.head}, call.matrix(h, *matrices[part]),
          {nullptr, 0}, {to[part], inner});
      continue;
    }
    for (int64_t m = 0; m < M; ++m) {
      for_each_register<V>(d, [&](int64_t c, int64_t n) {
        load_part<V>(parts[part] + m * layout.head + c, n).store(to[part] + m * inner + c);
      });
      for (int64_t c = (d + V::size - 1) / V::size * V::size; c < inner; ++c) {
        to[part][m * inner + c] = 0;
      }
    }
  }
  as_left<T>(M, inner, keys);
  as_left<T>(M, inner, queries);
  as_right<T>(values, M, inner, inner);
}

// Multiplies weights (M, count) of local queries from `first` on by 0 where they are dropped.
template <typename Acc>
inline void drop_columns(const AttentionDropout& dropout, int64_t image, int64_t head,
    int64_t first, int64_t count, int64_t rows, Acc* weights, int64_t stride) {
  const uint32_t threshold = dropout_threshold(dropout.p);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t m = 0; m < rows; m += 4) {
      const PhiloxWords words =
          philox(dropout.seed, static_cast<uint32_t>(m / 4), static_cast<uint32_t>(first + i),
              static_cast<uint32_t>(head), static_cast<uint32_t>(image));
      for (int64_t k = 0; k < smaller(4, rows - m); ++k) {
        if (words.word[k] < threshold) weights[(m + k) * stride + i] = 0;
      }
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
