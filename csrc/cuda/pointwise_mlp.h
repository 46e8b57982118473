// The block's MLP on the GPU: arguments, launch configuration, launchers. For any C++ compiler; no
// torch and no CUDA here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/divide_up.h"
#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet::cuda {

struct MlpShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;  // C
  int64_t hidden;    // R
  int64_t pixels = height * width;
  int64_t tokens = batch * pixels;
};

// Tokens that are worked on at a time; what is kept of a slab's has its rows alone.
struct MlpSlab {
  int64_t first;
  int64_t tokens;
};

struct MlpForward {
  MlpShape shape;
  const void* x;           // (B, H, W, C) contiguous
  const void* fc1_weight;  // (R, C) in the storage of x
  Parameter fc1_bias;      // (R)
  const void* fc2_weight;  // (C, R) in the storage of x
  Parameter fc2_bias;      // (C)
  Parameter scale, shift;  // (C)
  Parameter branch_scale;  // (B)
  void* normalized;        // scale·x + shift of a slab; null without affine and where fused
  void* activated;         // GELU of a slab's hidden activations; null where fused
  void* hidden;            // (B·H·W, R) before GELU, or null
  void* out;               // (B, H, W, C)
};

struct MlpBackward {
  MlpShape shape;
  const void* grad;                // (B, H, W, C) contiguous
  const void* x;                   // (B, H, W, C) contiguous
  const void* hidden;              // (B·H·W, R), or null: recomputed
  const void* fc1_weight;          // (R, C) in the storage of x
  Parameter fc1_bias;              // (R)
  const void* fc2_transposed;      // (R, C) in the storage of x
  Parameter scale, shift;          // (C)
  Parameter branch_scale;          // (B)
  void* normalized;                // scale·x + shift of a slab; null without affine
  void* grad_branch;               // branch_scale·grad of a slab; null without branch_scale
  void* activated;                 // GELU of a slab's hidden activations
  void* grad_hidden;               // of a slab, before GELU
  const void* grad_normalized;     // of a slab
  void* grad_x;                    // (B, H, W, C)
  float* fc1_partials;             // (hidden_slots, R, C) where fused, each value written once
  float* fc2_partials;             // (hidden_slots, C, R) where fused, likewise
  float* hidden_partials;          // (hidden_slots, R), likewise
  float* channel_partials;         // (3, channel_slots, C), likewise
  float* grad_fc1;                 // (R, C) where fused
  float* grad_fc2;                 // (C, R) where fused
  float* grad_fc1_bias;            // (R)
  float* grad_fc2_bias;            // (C)
  float *grad_scale, *grad_shift;  // (C)
};

// How a call is cut into blocks; from shape and layout alone.
struct MlpLaunch {
  static constexpr int threads = 128;
  static constexpr int fused_tokens = 128;    // of a block of the fused forward
  static constexpr int fused_channels = 128;  // that it takes at most
  static constexpr int slot_tile = 32;        // a slot of the fused backward has whole ones
  static constexpr int small_rows = 64;       // of products, and as many columns
  static constexpr int large_rows = 128;      // likewise
  static constexpr int channel_rows = 128;    // of a slot of sums over tokens
  static constexpr int channel_columns = 64;
  bool packed;          // 16 bytes per access to the arguments
  bool fused;           // hidden activations stay in registers: no slabs
  bool large_hidden;    // blocks of large_rows in products with R columns
  bool large_out;       // in those with C columns
  int64_t slab_tokens;  // at a time; a multiple of all numbers of rows
  int64_t slabs;
  int64_t hidden_slots;    // partial sums of db₁, fused also of dW₁ and dW₂
  int64_t tokens_of_slot;  // of those; not fused, the rows of a block
  int64_t channel_slots;   // partial sums of the other vectors

  // Hidden channels of a block of the fused backward.
  static constexpr int fused_hidden(int64_t channels) { return channels > 64 ? 64 : 128; }
  MlpSlab slab(const MlpShape& shape, int64_t i) const {
    const int64_t first = i * slab_tokens;
    return {first, std::min(slab_tokens, shape.tokens - first)};
  }
};

inline std::string text(const MlpLaunch& l) {
  const auto side = [](bool large) { return large ? "128" : "64"; };
  std::ostringstream out;
  if (l.fused) {
    out << "fused, blocks of " << MlpLaunch::fused_tokens << " tokens, slots " << l.hidden_slots
        << " of " << l.tokens_of_slot << " and " << l.channel_slots;
  } else {
    out << "slabs " << l.slabs << " of " << l.slab_tokens << " tokens, blocks of "
        << side(l.large_hidden) << " across hidden and " << side(l.large_out)
        << " across channels, slots " << l.hidden_slots << " and " << l.channel_slots;
  }
  out << ", access " << (l.packed ? "16 bytes" : "one value");
  return out.str();
}

namespace detail {

// `kept`: the hidden activations have to be in memory; two products are in one kernel where they
// are recomputed.
inline MlpLaunch mlp_launch_for(const MlpShape& shape, Storage storage, bool kept, bool recomputed,
    std::initializer_list<const void*> data) {
  constexpr int64_t max_extent = 0x7fffffff, max_tokens = int64_t{1} << 37;
  for (int64_t extent : {shape.channels, shape.hidden}) {
    if (extent > max_extent) {
      throw std::invalid_argument("fc1_weight: expected at most 2147483647 rows and columns, got " +
                                  std::to_string(extent));
    }
  }
  if (shape.tokens > max_tokens) {
    throw std::invalid_argument(
        "x: expected at most 137438953472 pixels, got " + std::to_string(shape.tokens));
  }
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  MlpLaunch l;
  l.packed = shape.channels % 8 == 0 && shape.hidden % 8 == 0 &&
             std::all_of(data.begin(), data.end(), is_aligned);

  // Slabs of 2^24 hidden activations (limit: memory of the intermediates; those of the next
  // product are partly in cache).
  constexpr int64_t slab_values = int64_t{1} << 24, unit = MlpLaunch::large_rows;
  const int64_t widest = std::max(shape.channels, shape.hidden);
  const int64_t most = std::max<int64_t>(unit, slab_values / widest / unit * unit);
  l.slab_tokens = std::min(most, std::max<int64_t>(1, divide_up(shape.tokens, unit)) * unit);
  l.slabs = divide_up(shape.tokens, l.slab_tokens);

  // Large blocks where they fill 132 multiprocessors (limit of float32 and of two products in one
  // kernel: registers).
  constexpr int64_t enough_blocks = 132;
  const auto is_large = [&](int64_t columns) {
    const int64_t blocks =
        divide_up(l.slab_tokens, MlpLaunch::large_rows) * divide_up(columns, MlpLaunch::large_rows);
    return storage != Storage::float32 && blocks >= enough_blocks;
  };
  l.large_hidden = is_large(shape.hidden) && !recomputed;
  l.large_out = is_large(shape.channels);

  // Fused on tensor cores alone: in float32 it is arithmetic that takes the time.
  l.fused = !kept && storage != Storage::float32 && shape.channels <= MlpLaunch::fused_channels;
  if (l.fused) {
    // Two blocks for each of 132 multiprocessors (limit: each leaves partial sums of its weights).
    constexpr int64_t enough = 264, tile = MlpLaunch::slot_tile;
    const int64_t hidden_blocks = divide_up(shape.hidden, MlpLaunch::fused_hidden(shape.channels));
    const int64_t most_slots = std::max<int64_t>(1, divide_up(shape.tokens, 4 * tile));
    const int64_t slots = std::min(divide_up(enough, hidden_blocks), most_slots);
    l.tokens_of_slot = divide_up(divide_up(shape.tokens, slots), tile) * tile;
  } else {
    l.tokens_of_slot = l.large_hidden ? MlpLaunch::large_rows : MlpLaunch::small_rows;
  }
  l.hidden_slots = divide_up(shape.tokens, l.tokens_of_slot);
  l.channel_slots = divide_up(shape.tokens, MlpLaunch::channel_rows);
  return l;
}

}  // namespace detail

inline MlpLaunch mlp_launch(const MlpForward& args, Storage storage) {
  return detail::mlp_launch_for(args.shape, storage, args.hidden != nullptr, false,
      {args.x, args.fc1_weight, args.fc1_bias.data, args.fc2_weight, args.fc2_bias.data,
          args.scale.data, args.shift.data, args.hidden, args.out});
}

inline MlpLaunch mlp_launch(const MlpBackward& args, Storage storage) {
  const bool kept = args.hidden != nullptr;
  return detail::mlp_launch_for(args.shape, storage, kept, !kept,
      {args.grad, args.x, args.hidden, args.fc1_weight, args.fc1_bias.data, args.fc2_transposed,
          args.scale.data, args.shift.data, args.grad_x});
}

// All enqueue on `stream` and throw std::runtime_error where CUDA refuses. They take at least one
// token.
void mlp_forward(const MlpForward& args, Storage storage, const MlpLaunch& l, CUstream_st* stream);

// Where fused, all gradients.
void mlp_backward_fused(
    const MlpBackward& args, Storage storage, const MlpLaunch& l, CUstream_st* stream);

// Elsewhere, for each slab in turn: mlp_backward_hidden, the product grad_normalized =
// grad_hidden·fc1_weight, mlp_backward_tokens; the weights' gradients are grad_hiddenᵀ·normalized
// and grad_branchᵀ·activated, with x and grad in the place of those that are null. Then
// mlp_backward_sums.
void mlp_backward_hidden(const MlpBackward& args, Storage storage, const MlpLaunch& l,
    const MlpSlab& slab, CUstream_st* stream);
void mlp_backward_tokens(const MlpBackward& args, Storage storage, const MlpLaunch& l,
    const MlpSlab& slab, CUstream_st* stream);
void mlp_backward_sums(const MlpBackward& args, const MlpLaunch& l, CUstream_st* stream);

// Adds `slabs` matrices of `values` each.
void mlp_backward_weight(
    const float* partials, int64_t slabs, int64_t values, float* sum, CUstream_st* stream);

}  // namespace dsnet::cuda
