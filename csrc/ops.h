// Every native operator once: what it fuses, its tensors and their shapes.
//
// Schemas and fake kernels are in dsnet_kernels/<op>.py; bindings/ implements these entries for a
// device. Activations are (B, C, H, W); results are channels_last.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

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
std::tuple<Tensor, Tensor, Tensor> global_attention(
    // inputs
    const Tensor& x,            // (B, M, C)
    int64_t num_heads,          // h
    const Tensor& norm_weight,  // (C), x's dtype or float32
    const Tensor& norm_bias,    // (C), likewise
    const Tensor& qkv_weight,   // (3·C, C), likewise; rows Q, K, V, then head, then channel
    const Tensor& qkv_bias,     // (3·C), likewise
    double eps, double dropout_p,
    const std::optional<Tensor>& seed,  // () int64, with dropout_p above 0
    bool keep_qkv);                     // for the backward, on the CPU
// returns (B, M, C), in float32 or float64 lse (B, h, M), log Σ exp of a query's scaled logits, and
// likewise [Q, K, V], kept for the CPU's backward, in its own order, or none

// Recomputes 1, 3 and, on a GPU, 2, then the gradients of all inputs.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_attention_backward(
    // gradients
    const Tensor& grad,  // (B, M, C)
    // saved
    const Tensor& x,                   // (B, M, C)
    const Tensor& lse,                 // (B, h, M)
    const std::optional<Tensor>& qkv,  // as the forward kept it, on the CPU
    int64_t num_heads,
    const Tensor& norm_weight,  // (C)
    const Tensor& norm_bias,    // (C)
    const Tensor& qkv_weight,   // (3·C, C)
    const Tensor& qkv_bias,     // (3·C)
    double eps, double dropout_p, const std::optional<Tensor>& seed);
// returns grad_x (B, M, C), and of the parameters in float32 or float64: (C), (C), (3·C, C), (3·C)

// Fused: 1 affine and LayerNorm · 2 projections or their absorbed form · 3 attention in both
// directions, dropout · 4 output projections · 5 residuals. One pass over the local tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> co_attention(
    // inputs
    const Tensor& local,                       // (B, N, Cl)
    const Tensor& global_,                     // (B, M, Cg)
    int64_t num_heads,                         // h
    const Tensor& global_norm_weight,          // (Cg), local's dtype or float32
    const Tensor& global_norm_bias,            // (Cg), likewise, as all that follow
    const Tensor& local_qkv_weight,            // (3·dim, Cl); rows Q, K, V, then head, then channel
    const Tensor& local_qkv_bias,              // (3·dim)
    const Tensor& global_qkv_weight,           // (3·dim, Cg)
    const Tensor& global_qkv_bias,             // (3·dim)
    const Tensor& local_proj_weight,           // (Cl, dim)
    const Tensor& local_proj_bias,             // (Cl)
    const Tensor& global_proj_weight,          // (Cg, dim)
    const Tensor& global_proj_bias,            // (Cg)
    const std::optional<Tensor>& local_scale,  // (Cl); none is 1
    const std::optional<Tensor>& local_shift,  // (Cl); none is 0
    double eps, double dropout_p,
    const std::optional<Tensor>& seed,  // () int64, with dropout_p above 0
    std::optional<bool> absorbed,       // none: what has fewer products
    bool keep_qkv);                     // for the backward, on the CPU
// returns (B, N, Cl), (B, M, Cg) and, in float32 or float64, of each softmax the maximum of its
// scaled logits and the sum of exp(logit − maximum), (B, h, N, 2) and (B, h, M, 2), what the global
// queries attended to, heads concatenated, (B, M, dim), and [Q, K, V] of the local tokens, where
// they are projected, and of the global ones, kept for the CPU's backward, in its own order, or
// none

// Recomputes 1, 3 and, on a GPU, 2, then the gradients of all inputs. One pass over the local
// tokens.
std::tuple<Tensor, Tensor, Tensor> co_attention_backward(
    // gradients
    const Tensor& grad_local,   // (B, N, Cl)
    const Tensor& grad_global,  // (B, M, Cg)
    // saved
    const Tensor& local,                      // (B, N, Cl)
    const Tensor& global_,                    // (B, M, Cg)
    const Tensor& local_softmax,              // (B, h, N, 2)
    const Tensor& global_softmax,             // (B, h, M, 2)
    const Tensor& attended,                   // (B, M, dim)
    const std::optional<Tensor>& local_qkv,   // as the forward kept them, on the CPU
    const std::optional<Tensor>& global_qkv,  // likewise
    int64_t num_heads, const Tensor& global_norm_weight, const Tensor& global_norm_bias,
    const Tensor& local_qkv_weight, const Tensor& local_qkv_bias, const Tensor& global_qkv_weight,
    const Tensor& global_qkv_bias, const Tensor& local_proj_weight, const Tensor& local_proj_bias,
    const Tensor& global_proj_weight, const Tensor& global_proj_bias,
    const std::optional<Tensor>& local_scale, const std::optional<Tensor>& local_shift, double eps,
    double dropout_p, const std::optional<Tensor>& seed, std::optional<bool> absorbed);
// returns grad_local, grad_global and, in float32 or float64, one row of all parameters' gradients
// in the order of the arguments, those of scale and shift last, given or not

// Fused: 1 mixing of the global stream on its grid · 2 bilinear upsampling · 3 mixing of the local
// stream · 4 bias · 5 factor of the image · 6 residual.
Tensor upsample_concat(
    // inputs
    const Tensor& local,                         // (B, Cl, H, W)
    const Tensor& global_,                       // (B, Cg, Hg, Wg)
    const Tensor& weight,                        // (C, Cl + Cg), local's dtype or float32
    const std::optional<Tensor>& bias,           // (C), likewise
    const std::optional<Tensor>& residual,       // (B, C, H, W)
    const std::optional<Tensor>& branch_scale);  // (B), local's dtype or float32
                                                 // returns (B, C, H, W)

// Fused: the gradients of both streams, of weight and bias; that of the residual is grad.
std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_concat_backward(
    // gradients
    const Tensor& grad,  // (B, C, H, W)
    // saved
    const Tensor& local,                         // (B, Cl, H, W)
    const Tensor& global_,                       // (B, Cg, Hg, Wg)
    const Tensor& weight,                        // (C, Cl + Cg)
    const std::optional<Tensor>& branch_scale);  // (B)
// returns grad_local, grad_global and, in float32 or float64, (C, Cl + Cg) and (C)

// Fused: 1 affine · 2 product · 3 bias and GELU · 4 product · 5 bias · 6 factor of the image ·
// 7 residual.
std::tuple<Tensor, Tensor> pointwise_mlp(
    // inputs
    const Tensor& x,                            // (B, C, H, W)
    const Tensor& fc1_weight,                   // (R, C), x's dtype or float32, as all that follow
    const std::optional<Tensor>& fc1_bias,      // (R)
    const Tensor& fc2_weight,                   // (C, R)
    const std::optional<Tensor>& fc2_bias,      // (C)
    const std::optional<Tensor>& scale,         // (C); none is 1
    const std::optional<Tensor>& shift,         // (C); none is 0
    const std::optional<Tensor>& branch_scale,  // (B); none is 1
    bool keep_hidden);                          // for the backward
// returns (B, C, H, W) and what is before GELU, in x's dtype and any order of the backend's own:
// R per token, tokens padded to a multiple of 16; (0) unless kept

// Recomputes 1 to 3 or, with hidden, GELU alone, then the gradients of all inputs but branch_scale.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_mlp_backward(
    // gradients
    const Tensor& grad,  // (B, C, H, W)
    // saved
    const Tensor& x,                             // (B, C, H, W)
    const std::optional<Tensor>& hidden,         // what the forward kept
    const Tensor& fc1_weight,                    // (R, C)
    const std::optional<Tensor>& fc1_bias,       // (R)
    const Tensor& fc2_weight,                    // (C, R)
    const std::optional<Tensor>& scale,          // (C)
    const std::optional<Tensor>& shift,          // (C)
    const std::optional<Tensor>& branch_scale);  // (B)
// returns grad_x (B, C, H, W) and, in float32 or float64, those of fc1_weight (R, C), fc1_bias (R),
// fc2_weight (C, R), fc2_bias (C), scale (C) and shift (C), given or not

// A convolution whose kernel is its stride, in inference. Fused: 1 gathering of patches · 2 product
// · 3 bias.
Tensor patch_conv(
    // inputs
    const Tensor& x,       // (B, C, H, W)
    const Tensor& packed,  // what patch_conv_pack returns
    int64_t outputs,       // O
    int64_t patch);        // p; what is left at the ends of H and W counts for nothing
// returns (B, O, ⌊H/p⌋, ⌊W/p⌋)

Tensor patch_conv_pack(const Tensor& weight,  // (O, p·p·C), a patch's pixels row by row; x's dtype
    const std::optional<Tensor>& bias);       // (O), likewise or float32
// returns accumulators, for the instruction set in use

// A whole block in inference. Fused: the operations above, image by image.
std::tuple<Tensor, Tensor, Tensor> ds_block(
    // inputs
    const Tensor& x,                    // (B, C, H, W), float32 or bfloat16
    const Tensor& packed,               // what ds_block_pack returns
    const std::vector<int64_t>& sizes,  // C, Cl, Cg, dim, heads, R, Hg, Wg
    double attention_eps, double co_attention_eps,
    bool with_streams);  // return both streams as they enter the fusion
// returns (B, C, H, W) and, with images only if asked for, (B, Cl, H, W) and (B, Cg, Hg, Wg)

Tensor ds_block_pack(const Tensor& x,  // gives dtype and grid
    const std::vector<Tensor>&
        parameters,  // in the order of dsnet_kernels/ds_block.py, x's dtype or float32
    const std::vector<int64_t>& sizes);
// returns accumulators, for the instruction set in use and, of grids, for those that co-attention
// absorbs the same projections for

}  // namespace dsnet
