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

// As it is, or copied: asked first, since a call of torch costs microseconds.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

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

inline void check_same_dtype(
    const char* name, const Tensor& tensor, const char* leader_name, const Tensor& leader) {
  check(tensor.scalar_type() == leader.scalar_type(), name, ": expected ", leader_name,
      "'s dtype, ", torch::headeronly::toString(leader.scalar_type()), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
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
  check_same_dtype("grad", grad, "x", x);
}

inline void check_dropout(double dropout_p, const OptionalTensor& seed) {
  check(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected 0 <= dropout_p < 1, got ", dropout_p);
  check(dropout_p == 0 || seed.has_value(), "seed: expected a tensor with dropout_p above 0");
  if (seed.has_value()) {
    check_shape("seed", *seed, {});
    check(seed->scalar_type() == ScalarType::Long, "seed: expected int64, got ",
        torch::headeronly::toString(seed->scalar_type()));
  }
}

// Heads as the kernels take them.
inline void check_head_dim(const char* name, int64_t head_dim) {
  check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 128, name,
      ": expected heads of 8, 16, … 128 channels, got ", head_dim);
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
  check_head_dim("x", shape.head_dim);
  check_shape("norm_weight", norm_weight, {width});
  check_shape("norm_bias", norm_bias, {width});
  check_shape("qkv_weight", qkv_weight, {3 * width, width});
  check_shape("qkv_bias", qkv_bias, {3 * width});
  check_dropout(dropout_p, seed);
  return shape;
}

// Parameters of co-attention by name, in the order of the operator's arguments.
struct CoAttentionParameters {
  const Tensor &global_norm_weight, &global_norm_bias;
  const Tensor &local_qkv_weight, &local_qkv_bias, &global_qkv_weight, &global_qkv_bias;
  const Tensor &local_proj_weight, &local_proj_bias, &global_proj_weight, &global_proj_bias;
  const OptionalTensor &local_scale, &local_shift;
};

// The same for co-attention; Shape is {batch, local tokens, global tokens, local width, global
// width, heads, head_dim}.
template <typename Shape>
Shape check_co_attention(const Tensor& local, const Tensor& global, int64_t num_heads,
    const CoAttentionParameters& parameters, double dropout_p, const OptionalTensor& seed) {
  check(local.dim() == 3, "local: expected shape (B, N, Cl), got ", shape_text(local.sizes()));
  check(global.dim() == 3, "global_: expected shape (B, M, Cg), got ", shape_text(global.sizes()));
  const int64_t batch = local.size(0), local_width = local.size(2), global_width = global.size(2);
  check_shape("global_", global, {batch, global.size(1), global_width});
  check_same_dtype("global_", global, "local", local);
  check(local.size(1) > 0 && local_width > 0,
      "local: expected at least one token and channel, got ", shape_text(local.sizes()));
  check(global.size(1) > 0 && global_width > 0,
      "global_: expected at least one token and channel, got ", shape_text(global.sizes()));
  const auto& p = parameters;
  check(p.local_proj_weight.dim() == 2, "local_proj_weight: expected shape (Cl, dim), got ",
      shape_text(p.local_proj_weight.sizes()));
  const int64_t dim = p.local_proj_weight.size(1);
  check(num_heads > 0 && dim % num_heads == 0, "num_heads: expected a divisor of the common width ",
      dim, ", got ", num_heads);
  check_head_dim("local_proj_weight", dim / num_heads);
  check_shape("global_norm_weight", p.global_norm_weight, {global_width});
  check_shape("global_norm_bias", p.global_norm_bias, {global_width});
  check_shape("local_qkv_weight", p.local_qkv_weight, {3 * dim, local_width});
  check_shape("local_qkv_bias", p.local_qkv_bias, {3 * dim});
  check_shape("global_qkv_weight", p.global_qkv_weight, {3 * dim, global_width});
  check_shape("global_qkv_bias", p.global_qkv_bias, {3 * dim});
  check_shape("local_proj_weight", p.local_proj_weight, {local_width, dim});
  check_shape("local_proj_bias", p.local_proj_bias, {local_width});
  check_shape("global_proj_weight", p.global_proj_weight, {global_width, dim});
  check_shape("global_proj_bias", p.global_proj_bias, {global_width});
  check_shape("local_scale", p.local_scale, {local_width});
  check_shape("local_shift", p.local_shift, {local_width});
  check_dropout(dropout_p, seed);
  return {
      batch, local.size(1), global.size(1), local_width, global_width, num_heads, dim / num_heads};
}

// The same for upsampling and concatenation; Shape is {batch, height, width, global height, global
// width, local channels, global channels, channels}.
template <typename Shape>
Shape check_upsample_concat(const Tensor& local, const Tensor& global, const Tensor& weight,
    const OptionalTensor& factors) {
  check(local.dim() == 4, "local: expected shape (B, Cl, H, W), got ", shape_text(local.sizes()));
  check(global.dim() == 4, "global_: expected shape (B, Cg, Hg, Wg), got ",
      shape_text(global.sizes()));
  check_same_dtype("global_", global, "local", local);
  const Shape shape{local.size(0), local.size(2), local.size(3), global.size(2), global.size(3),
      local.size(1), global.size(1), weight.size(0)};
  check(local.size(1) > 0 && local.size(2) > 0 && local.size(3) > 0,
      "local: expected at least one channel and pixel, got ", shape_text(local.sizes()));
  check(global.size(1) > 0 && global.size(2) > 0 && global.size(3) > 0,
      "global_: expected at least one channel and pixel, got ", shape_text(global.sizes()));
  check_shape("global_", global, {local.size(0), global.size(1), global.size(2), global.size(3)});
  check_shape("weight", weight, {weight.size(0), local.size(1) + global.size(1)});
  check_shape("branch_scale", factors, {local.size(0)});
  return shape;
}

// Parameters of the MLP by name, in the order of the operator's arguments.
struct MlpParameters {
  const Tensor& fc1_weight;
  const OptionalTensor& fc1_bias;
  const Tensor& fc2_weight;
  const OptionalTensor &fc2_bias, &scale, &shift, &branch_scale;
};

// The same for the MLP; Shape is {batch, height, width, channels, hidden channels}.
template <typename Shape>
Shape check_pointwise_mlp(const Tensor& x, const MlpParameters& parameters) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  const auto& p = parameters;
  check(p.fc1_weight.dim() == 2, "fc1_weight: expected shape (R, C), got ",
      shape_text(p.fc1_weight.sizes()));
  const int64_t channels = x.size(1), hidden = p.fc1_weight.size(0);
  check(channels > 0, "x: expected at least one channel, got ", shape_text(x.sizes()));
  check(hidden > 0, "fc1_weight: expected at least one hidden channel, got ",
      shape_text(p.fc1_weight.sizes()));
  check_shape("fc1_weight", p.fc1_weight, {hidden, channels});
  check_shape("fc1_bias", p.fc1_bias, {hidden});
  check_shape("fc2_weight", p.fc2_weight, {channels, hidden});
  check_shape("fc2_bias", p.fc2_bias, {channels});
  check_shape("scale", p.scale, {channels});
  check_shape("shift", p.shift, {channels});
  check_shape("branch_scale", p.branch_scale, {x.size(0)});
  return {x.size(0), x.size(2), x.size(3), channels, hidden};
}

}  // namespace dsnet
