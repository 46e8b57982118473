// What the bindings of every device do with their arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/checks.h"
#include "ops.h"

namespace dsnet {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// Channels next to each other, as they are or copied to channels_last.
inline Tensor with_adjacent_channels(const Tensor& x) {
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// The strides that kernels walk, for each device's own struct.
template <typename Pixels>
Pixels pixels_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}

inline Tensor empty_channels_last(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device(),
      std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Checks everything that both directions share; returns the extents as the device's own struct.
template <typename Shape>
Shape check_depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  const Shape shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  check(shape.channels > 0 && shape.height > 0 && shape.width > 0,
      "x: expected at least one channel and pixel, got ", shape_text(x.sizes()));
  check_shape("weight", weight, {shape.channels, 1, 3, 3});
  check_shape("bias", bias, {shape.channels});
  check_shape("scale", scale, {shape.channels});
  check_shape("shift", shift, {shape.channels});
  return shape;
}

inline void check_gradient(const Tensor& grad, const Tensor& x) {
  check_shape("grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check(grad.scalar_type() == x.scalar_type(), "grad: expected x's dtype, ",
      torch::headeronly::toString(x.scalar_type()), ", got ",
      torch::headeronly::toString(grad.scalar_type()));
}

// The same for attention.
template <typename Shape>
Shape check_attention(const Tensor& x, int64_t num_heads, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& qkv_weight, const Tensor& qkv_bias, double dropout_p,
    const OptionalTensor& seed) {
  check(x.dim() == 3, "x: expected shape (B, M, C), got ", shape_text(x.sizes()));
  const int64_t width = x.size(2);
  check(num_heads > 0 && width % num_heads == 0, "num_heads: expected a divisor of x's ", width,
      " channels, got ", num_heads);
  const Shape shape{x.size(0), x.size(1), num_heads, width / num_heads};
  check(shape.head_dim % 8 == 0 && shape.head_dim >= 8 && shape.head_dim <= 128,
      "x: expected heads of 8, 16, … 128 channels, got ", shape.head_dim);
  check_shape("norm_weight", norm_weight, {width});
  check_shape("norm_bias", norm_bias, {width});
  check_shape("qkv_weight", qkv_weight, {3 * width, width});
  check_shape("qkv_bias", qkv_bias, {3 * width});
  check(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected 0 <= dropout_p < 1, got ", dropout_p);
  check(dropout_p == 0 || seed.has_value(), "seed: expected a tensor with dropout_p above 0");
  if (seed.has_value()) {
    check_shape("seed", *seed, {});
    check(seed->scalar_type() == ScalarType::Long, "seed: expected int64, got ",
        torch::headeronly::toString(seed->scalar_type()));
  }
  return shape;
}

}  // namespace dsnet
