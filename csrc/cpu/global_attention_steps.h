// What forward and backward of global self-attention share: memory and LayerNorm.
#pragma once

#include "attention_steps.h"
#include "global_attention.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// A call's memory with its types.
template <typename T>
struct Call {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const AttentionCall& args;
  const AttentionShape& shape;
  AttentionLayout layout;
  Acc scale;

  explicit Call(const AttentionCall& a)
      : args(a),
        shape(a.shape),
        layout(a.shape),
        scale(Acc{1} / square_root(static_cast<Acc>(a.shape.head_dim))) {}

  Acc* packed() const { return static_cast<Acc*>(args.packed); }
  Acc* packed_head(int64_t head) const {
    return packed() + 2 * layout.width + head * layout.packed_head;
  }
  const T* x(int64_t image, int64_t token) const {
    return static_cast<const T*>(args.x) + (image * shape.tokens + token) * shape.width();
  }
  // Where a head's [Q, K, V] lie, and its transposed keys, with many tokens.
  int64_t qkv_offset(int64_t image, int64_t head) const {
    return (image * shape.heads + head) * shape.tokens * layout.head;
  }
  int64_t keys_offset(int64_t image, int64_t head) const {
    return (image * shape.heads + head) * shape.head_dim * layout.keys;
  }
};

// Packs the norm alone.
template <typename T>
void pack_norm(const Call<T>& call) {
  using Acc = AccumulatorOf<T>;
  const int64_t C = call.shape.width(), width = call.layout.width;
  Acc* weight = call.packed();
  for (int64_t c = 0; c < width; ++c) {
    weight[c] = c < C ? value_at<T, Acc>(call.args.norm_weight, c) : Acc{0};
    weight[width + c] = c < C ? value_at<T, Acc>(call.args.norm_bias, c) : Acc{0};
  }
}

// y (count, layout.width) = LayerNorm of an image's tokens from `first` on; with their moments
// where `kept` is not null.
template <typename T>
void normalise_tokens(const Call<T>& call, int64_t image, int64_t first, int64_t count,
    AccumulatorOf<T>* y, Moments<AccumulatorOf<T>>* kept = nullptr) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t C = call.shape.width(), stride = call.layout.width;
  const Acc* weight = call.packed();
  const Acc* bias = weight + stride;
  const T* x = call.x(image, first);
  const auto tokens = [&](auto rows, int64_t i) {
    constexpr int R = decltype(rows)::value;
    Moments<Acc> moments[R];
    moments_of<V, R>(x + i * C, C, C, static_cast<Acc>(call.args.eps), moments);
    for (int r = 0; r < R; ++r) {
      normalise<V>(x + (i + r) * C, C, stride, moments[r], weight, bias, y + (i + r) * stride);
      if constexpr (Products<T>::pairs) pair_columns(y + (i + r) * stride, C);
      if (kept != nullptr) kept[i + r] = moments[r];
    }
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) tokens(Constant<4>{}, i);
  for (; i < count; ++i) tokens(Constant<1>{}, i);
}

// Zeroes keys behind the last token, so that their scores are finite.
template <typename T>
void clear_padding(const Call<T>& call, AccumulatorOf<T>* keys) {
  for (int64_t k = 0; k < call.shape.head_dim; ++k) {
    for (int64_t j = call.shape.tokens; j < call.layout.keys; ++j) {
      keys[k * call.layout.keys + j] = 0;
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
