// Co-attention between the streams on the GPU: arguments, launch configuration, launchers. For any
// C++ compiler; no torch and no CUDA here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/absorbs.h"
#include "cuda/divide_up.h"
#include "cuda/global_attention.h"

namespace dsnet::cuda {

struct CoAttentionShape {
  int64_t batch;
  int64_t local_tokens;   // N
  int64_t global_tokens;  // M
  int64_t local_width;    // Cl
  int64_t global_width;   // Cg
  int64_t heads;
  int64_t head_dim;
  int64_t width = heads * head_dim;  // dim
};

// What forward and backward read.
struct CoAttentionInputs {
  const void* local;                               // (B, N, Cl) contiguous
  const void* global;                              // (B, M, Cg) contiguous
  Parameter global_norm_weight, global_norm_bias;  // (Cg)
  Parameter local_qkv_weight, local_qkv_bias;      // (3·dim, Cl) and (3·dim)
  Parameter global_qkv_weight, global_qkv_bias;    // (3·dim, Cg) and (3·dim)
  Parameter local_proj_weight, local_proj_bias;    // (Cl, dim) and (Cl)
  Parameter global_proj_weight, global_proj_bias;  // (Cg, dim) and (Cg)
  Parameter local_scale, local_shift;              // (Cl) or null
  float eps;
  Dropout dropout;
};

struct CoAttentionForward {
  CoAttentionShape shape;
  CoAttentionInputs inputs;
  void* out_local;        // (B, N, Cl)
  void* out_global;       // (B, M, Cg)
  float* local_softmax;   // (B, h, N, 2), maximum of the scaled logits and Σ exp(logit − maximum)
  float* global_softmax;  // (B, h, M, 2)
  float* attended;        // (B, M, dim)
  void* workspace;        // of co_attention_workspace's bytes, aligned to 16
};

// Three parts: kernels, the weights' gradients as the products that co_attention_products lists,
// and what the local affine makes of them.
struct CoAttentionBackward {
  CoAttentionShape shape;
  CoAttentionInputs inputs;
  const void* grad_local;       // (B, N, Cl) contiguous
  const void* grad_global;      // (B, M, Cg) contiguous
  const float* global_softmax;  // (B, h, M, 2)
  const float* attended;        // (B, M, dim)
  void* out_local;              // (B, N, Cl), the gradient of local
  void* out_global;             // (B, M, Cg)
  float* parameters;            // their gradients in a row, in the order of the arguments
  void* workspace;
};

// How a call is cut into blocks; from shape, form and alignment alone.
struct CoAttentionLaunch {
  static constexpr int block_rows = 64;     // tokens of a block
  static constexpr int max_absorbed = 128;  // channels that the absorbed form's tiles hold
  bool absorbed;         // the local projections are folded into matrices of the global tokens
  bool folds;            // the local affine, into the projections
  bool copies_tokens;    // absorbed: ragged channels or unaligned memory
  bool copies_grad;      // of the local stream, likewise
  bool packed;           // 16 bytes per access to the local stream and its result
  int columns;           // of queries, keys and values
  int column_tile;       // for which a kernel is compiled
  int64_t local_tiles;   // blocks down the local tokens of an image
  int64_t global_tiles;  // blocks down its global tokens
  int64_t splits;        // parts of the local tokens between which a global row's sums are shared
  int64_t split_rows;    // tokens of each
  int64_t slots;         // partial sums over all local or global tokens
};

inline std::string text(const CoAttentionLaunch& l) {
  std::ostringstream out;
  out << (l.absorbed ? "absorbed" : "projected") << ", columns " << l.columns << " of "
      << l.column_tile << ", tiles " << l.local_tiles << " local, " << l.global_tiles
      << " global, splits " << l.splits << " of " << l.split_rows << " tokens, slots " << l.slots
      << ", access " << (l.packed ? "16 bytes" : "one value");
  return out.str();
}

namespace detail {

inline bool all_aligned(std::initializer_list<const void*> all) {
  return std::all_of(all.begin(), all.end(), is_attention_aligned);
}

inline CoAttentionLaunch co_attention_launch_for(const CoAttentionShape& shape,
    const CoAttentionInputs& inputs, const void* grad, const void* out, int absorbed) {
  constexpr int64_t most = 0x7fffffff, rows = CoAttentionLaunch::block_rows;
  if (std::max(shape.local_tokens, shape.global_tokens) > most - rows) {
    throw std::invalid_argument("local: expected fewer than 2147483584 tokens, got " +
                                std::to_string(shape.local_tokens) + " and " +
                                std::to_string(shape.global_tokens) + " global ones");
  }
  CoAttentionLaunch l;
  const bool wanted = absorbed < 0 ? absorbs(shape.local_tokens, shape.global_tokens,
                                         shape.local_width, shape.heads)
                                   : absorbed > 0;
  l.absorbed = wanted && shape.local_width <= CoAttentionLaunch::max_absorbed;
  const bool is_even = shape.local_width % 8 == 0;
  l.folds = inputs.local_scale.data != nullptr || inputs.local_shift.data != nullptr;
  l.copies_tokens = l.absorbed && (!is_even || !all_aligned({inputs.local}));
  l.copies_grad = l.absorbed && (!is_even || !all_aligned({grad}));
  l.packed = is_even && all_aligned({inputs.local, grad, out});
  l.columns = static_cast<int>(l.absorbed ? divide_up(shape.local_width, 8) * 8 : shape.head_dim);
  l.column_tile = l.columns <= 32 ? 32 : l.columns <= 64 ? 64 : 128;
  l.local_tiles = divide_up(shape.local_tokens, rows);
  l.global_tiles = divide_up(shape.global_tokens, rows);

  // Limits: blocks to fill a GPU with, and tiles enough for each that its partial sums are few.
  constexpr int64_t enough_blocks = 512, least_tiles = 4;
  const int64_t blocks = std::max<int64_t>(1, shape.batch * shape.heads * l.global_tiles);
  const int64_t wanted_splits = std::clamp<int64_t>(
      divide_up(enough_blocks, blocks), 1, divide_up(l.local_tiles, least_tiles));
  l.split_rows = divide_up(l.local_tiles, wanted_splits) * rows;
  l.splits = divide_up(shape.local_tokens, l.split_rows);
  l.slots = 128;
  const int64_t local_blocks = shape.batch * shape.heads * l.local_tiles;
  // The backward may have two blocks for each.
  if (2 * std::max(local_blocks, blocks * l.splits) > most) {
    throw std::invalid_argument("local: expected at most 1073741823 blocks of 64 tokens, got " +
                                std::to_string(std::max(local_blocks, blocks * l.splits)));
  }
  return l;
}

}  // namespace detail

// `absorbed`: 1 or 0, or −1 for the form with fewer products. The absorbed form is for local
// streams of up to 128 channels.
inline CoAttentionLaunch co_attention_launch(const CoAttentionForward& args, int absorbed) {
  return detail::co_attention_launch_for(
      args.shape, args.inputs, nullptr, args.out_local, absorbed);
}
inline CoAttentionLaunch co_attention_launch(const CoAttentionBackward& args, int absorbed) {
  return detail::co_attention_launch_for(
      args.shape, args.inputs, args.grad_local, args.out_local, absorbed);
}

// Where each parameter's gradient begins in the row of all.
struct ParameterOffsets {
  int64_t norm_weight, norm_bias, local_qkv_weight, local_qkv_bias, global_qkv_weight,
      global_qkv_bias, local_proj_weight, local_proj_bias, global_proj_weight, global_proj_bias,
      scale, shift, end;

  explicit ParameterOffsets(const CoAttentionShape& shape) {
    const int64_t local = shape.local_width, global = shape.global_width, width = shape.width;
    norm_weight = 0;
    norm_bias = norm_weight + global;
    local_qkv_weight = norm_bias + global;
    local_qkv_bias = local_qkv_weight + 3 * width * local;
    global_qkv_weight = local_qkv_bias + 3 * width;
    global_qkv_bias = global_qkv_weight + 3 * width * global;
    local_proj_weight = global_qkv_bias + 3 * width;
    local_proj_bias = local_proj_weight + local * width;
    global_proj_weight = local_proj_bias + local;
    global_proj_bias = global_proj_weight + global * width;
    scale = global_proj_bias + global;
    shift = scale + local;
    end = shift + local;
  }
};

inline int64_t co_attention_parameters(const CoAttentionShape& shape) {
  return ParameterOffsets(shape).end;
}

// A sum over tokens: out (left_columns, right_columns) = leftᵀ·right, on the GPU a dense product.
struct TokenProduct {
  const void* left;   // (rows, left_columns), rows left_stride apart
  const void* right;  // (rows, right_columns)
  float* out;
  bool is_float32;  // or in the storage of the streams
  int64_t rows, left_columns, left_stride, right_columns, right_stride, out_stride;
};

// Bytes of a call's workspace.
size_t co_attention_workspace(
    const CoAttentionForward& args, Storage storage, const CoAttentionLaunch& l);
size_t co_attention_workspace(
    const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l);

// Both enqueue on `stream` and throw std::runtime_error where CUDA refuses. Without images they do
// nothing.
void co_attention_forward(const CoAttentionForward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream);
// Writes all but the gradients of weights, of the local projections' biases, scale and shift.
void co_attention_backward(const CoAttentionBackward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream);
// The gradients of weights, from what co_attention_backward leaves in the workspace.
std::vector<TokenProduct> co_attention_products(
    const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l);
// The last step: gradients of local projections, scale and shift, from the products.
void co_attention_backward_projections(const CoAttentionBackward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream);

}  // namespace dsnet::cuda
