// Every native operator once: what it fuses, its tensors and their shapes.
//
// Schemas and fake kernels are in dsnet_kernels/<op>.py; bindings/ implements these entries for a
// device. Activations are (B, C, H, W); results are channels_last.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dsnet {

using torch::stable::Tensor;

// Fused: 1 affine · 2 zero padding · 3 depthwise convolution · 4 bias · 5 residual.
Tensor depthwise_conv3x3(
    // inputs
    const Tensor& x,                     // (B, C, H, W)
    const Tensor& weight,                // (C, 1, 3, 3), x's dtype or float32
    const std::optional<Tensor>& bias,   // (C), likewise
    const std::optional<Tensor>& scale,  // (C), likewise; none is 1
    const std::optional<Tensor>& shift,  // (C), likewise; none is 0
    bool residual);                      // add x
                                         // returns (B, C, H, W)

// Fused: the gradients of all inputs in one pass over grad and x.
std::tuple<Tensor, Tensor> depthwise_conv3x3_backward(
    // gradients
    const Tensor& grad,  // (B, C, H, W)
    // saved
    const Tensor& x,                     // (B, C, H, W)
    const Tensor& weight,                // (C, 1, 3, 3)
    const std::optional<Tensor>& scale,  // (C)
    const std::optional<Tensor>& shift,  // (C)
    bool residual);
// returns grad_x (B, C, H, W) and (12, C) in float32 or float64: nine taps, bias, scale, shift

// Fused: 1 LayerNorm · 2 QKV projection · 3 attention, dropout · 4 residual.
std::tuple<Tensor, Tensor> global_attention(
    // inputs
    const Tensor& x,            // (B, M, C)
    int64_t num_heads,          // h
    const Tensor& norm_weight,  // (C), x's dtype or float32
    const Tensor& norm_bias,    // (C), likewise
    const Tensor& qkv_weight,   // (3·C, C), likewise; rows Q, K, V, then head, then channel
    const Tensor& qkv_bias,     // (3·C), likewise
    double eps, double dropout_p,
    const std::optional<Tensor>& seed);  // () int64, with dropout_p above 0
// returns (B, M, C) and lse (B, h, M) in float32 or float64, log Σ exp of a query's scaled logits

// Recomputes 1 to 3, then the gradients of all inputs.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_attention_backward(
    // gradients
    const Tensor& grad,  // (B, M, C)
    // saved
    const Tensor& x,    // (B, M, C)
    const Tensor& lse,  // (B, h, M)
    int64_t num_heads,
    const Tensor& norm_weight,  // (C)
    const Tensor& norm_bias,    // (C)
    const Tensor& qkv_weight,   // (3·C, C)
    const Tensor& qkv_bias,     // (3·C)
    double eps, double dropout_p, const std::optional<Tensor>& seed);
// returns grad_x (B, M, C), and of the parameters in float32 or float64: (C), (C), (3·C, C), (3·C)

}  // namespace dsnet
