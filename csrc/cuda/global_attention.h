// Self-attention among the global tokens on the GPU: arguments, launch configuration, launchers.
// For any C++ compiler; no torch and no CUDA here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "cuda/divide_up.h"
#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet::cuda {

struct AttentionShape {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t width = heads * head_dim;  // C
};

// Dropout of attention weights; without it the threshold is 0 and the seed is not read.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float kept_scale = 1;
};

inline Dropout dropout_of(double p, const int64_t* seed) {
  if (p == 0) return {};
  return {seed, dropout_threshold(p), static_cast<float>(1 / (1 - p))};
}

// What forward and backward read. qkv_weight is in the storage of x.
struct AttentionInputs {
  const void* x;           // (B, M, C) contiguous
  Parameter norm_weight;   // (C)
  Parameter norm_bias;     // (C)
  const void* qkv_weight;  // (3·C, C), rows Q, K, V, then head, then channel
  Parameter qkv_bias;      // (3·C)
  float eps;
  Dropout dropout;
};

struct AttentionForward {
  AttentionShape shape;
  AttentionInputs inputs;
  void* out;   // (B, M, C)
  float* lse;  // (B, h, M)
  void* qkv;   // (B, M, 3·C), not used by a fused launch
};

// Two parts, with the dense products between them: grad_normalized = grad_qkv · qkv_weight.
struct AttentionBackward {
  AttentionShape shape;
  AttentionInputs inputs;
  const void* grad;             // (B, M, C) contiguous
  const float* lse;             // (B, h, M)
  void* qkv;                    // (B, M, 3·C)
  void* normalized;             // (B, M, C), LayerNorm of x
  float* statistics;            // (B, M, 2), mean and 1 / deviation
  float* row_sums;              // (2, B, h, M), Σ P·dP and 1 / Σ P of a query
  void* grad_qkv;               // (B, M, 3·C)
  const void* grad_normalized;  // (B, M, C)
  void* grad_x;                 // (B, M, C)
  float* partials;              // (slots, 3·C), each value written once
  float* grad_norm_weight;      // (C)
  float* grad_norm_bias;        // (C)
  float* grad_qkv_bias;         // (3·C)
};

// How a call is cut into blocks; from shape and layout alone.
struct AttentionLaunch {
  static constexpr int warp_rows = 16;      // tokens of a warp
  static constexpr int block_rows = 64;     // tokens of a block
  static constexpr int block_columns = 96;  // of the 3·C of Q, K and V
  bool fused;                               // few tokens: from LayerNorm to residual in one kernel
  bool packed;                              // 16 bytes per access to the arguments
  int head_tile;                            // head dimension that the kernel is compiled for
  int fused_threads;                        // of a fused block
  int64_t row_tiles;                        // blocks down the tokens of an image
  int64_t token_blocks;                     // blocks down all B·M tokens
  int64_t column_blocks;                    // blocks across the 3·C columns
  int64_t slots;                            // partial sums over the tokens
  int64_t slot_rows;                        // tokens of each
  int64_t heads_of_batch;                   // B·h

  int64_t attention_blocks() const { return heads_of_batch * row_tiles; }
  int64_t projection_blocks() const { return token_blocks * column_blocks; }
};

inline std::string text(const AttentionLaunch& l) {
  std::ostringstream out;
  if (l.fused) {
    out << "fused, blocks " << l.attention_blocks() << " of " << l.fused_threads << " threads";
  } else {
    out << "projection blocks " << l.token_blocks << " x " << l.column_blocks
        << ", attention blocks " << l.heads_of_batch << " x " << l.row_tiles << ", head tile "
        << l.head_tile;
  }
  out << ", slots " << l.slots << " of " << l.slot_rows << " tokens, access "
      << (l.packed ? "16 bytes" : "one value");
  return out.str();
}

namespace detail {

inline bool is_attention_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline bool are_aligned(const AttentionInputs& inputs) {
  const void* all[] = {inputs.x, inputs.norm_weight.data, inputs.norm_bias.data, inputs.qkv_weight};
  return std::all_of(std::begin(all), std::end(all), is_attention_aligned);
}

inline AttentionLaunch attention_launch_for(const AttentionShape& shape, bool packed) {
  constexpr int64_t max_tokens = 0x7fffffff, max_blocks = 0x7fffffff;
  if (shape.tokens > max_tokens) {
    throw std::invalid_argument(
        "x: expected at most 2147483647 tokens, got " + std::to_string(shape.tokens));
  }
  AttentionLaunch l;
  // Limits: the keys of one tile, and the head dimension that a fused block keeps in registers.
  l.fused = shape.tokens <= AttentionLaunch::block_rows && shape.head_dim <= 32;
  l.packed = packed;
  l.head_tile = shape.head_dim <= 32 ? 32 : shape.head_dim <= 64 ? 64 : 128;
  l.row_tiles = divide_up(shape.tokens, AttentionLaunch::block_rows);
  const int64_t row_warps = divide_up(shape.tokens, AttentionLaunch::warp_rows);
  l.fused_threads = static_cast<int>(32 * std::clamp<int64_t>(row_warps, 1, 4));
  l.heads_of_batch = shape.batch * shape.heads;
  const int64_t all_tokens = shape.batch * shape.tokens;
  l.token_blocks = divide_up(all_tokens, AttentionLaunch::block_rows);
  l.column_blocks = divide_up(3 * shape.width, AttentionLaunch::block_columns);

  // Limit on slots: their partial sums are read again.
  constexpr int64_t max_slots = 128, least_rows = 64;
  l.slot_rows = std::max(least_rows, divide_up(all_tokens, max_slots));
  l.slots = divide_up(all_tokens, l.slot_rows);
  // The backward may have two blocks for each of attention.
  if (std::max(2 * l.attention_blocks(), l.projection_blocks()) > max_blocks) {
    throw std::invalid_argument("x: expected at most 2147483647 blocks of 64 tokens, got " +
                                std::to_string(l.attention_blocks()) + " of attention and " +
                                std::to_string(l.projection_blocks()) + " of projection");
  }
  return l;
}

}  // namespace detail

inline AttentionLaunch attention_launch(const AttentionForward& args) {
  return detail::attention_launch_for(args.shape, detail::are_aligned(args.inputs));
}

inline AttentionLaunch attention_launch(const AttentionBackward& args) {
  const bool packed = detail::are_aligned(args.inputs) && detail::is_attention_aligned(args.grad);
  return detail::attention_launch_for(args.shape, packed);
}

// All enqueue on `stream` and throw std::runtime_error where CUDA refuses. Without tokens they do
// nothing.
void attention_forward(
    const AttentionForward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream);
// Writes qkv, normalized, statistics, row_sums, grad_qkv and grad_qkv_bias.
void attention_backward_scores(
    const AttentionBackward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream);
// Writes grad_x, grad_norm_weight and grad_norm_bias, from grad_normalized.
void attention_backward_norm(
    const AttentionBackward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream);

}  // namespace dsnet::cuda
