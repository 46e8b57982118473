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

}  // namespace dsnet
