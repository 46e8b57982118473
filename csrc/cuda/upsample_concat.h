// Upsampling, concatenation and 1×1 mixing on the GPU: arguments, launch configuration, launchers.
// For any C++ compiler; no torch and no CUDA here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet::cuda {

struct UpsampleShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t global_height;
  int64_t global_width;
  int64_t local_channels;   // Cl
  int64_t global_channels;  // Cg
  int64_t channels;         // C
  int64_t pixels = height * width;
  int64_t cells = global_height * global_width;
  int64_t weight_columns = local_channels + global_channels;
};

struct UpsampleForward {
  UpsampleShape shape;
  const void* local;       // (B, H, W, Cl) contiguous
  const void* global;      // (B, Hg, Wg, Cg) contiguous
  const void* weight;      // (C, Cl + Cg) in the storage of local
  Parameter bias;          // (C)
  const void* residual;    // (B, H, W, C) contiguous, or null
  Parameter branch_scale;  // (B)
  float* mixed;            // (B, Hg, Wg, C), global · W_gᵀ
  void* out;               // (B, H, W, C)
};

struct UpsampleBackward {
  UpsampleShape shape;
  const void* grad;        // (B, H, W, C) contiguous
  const void* local;       // (B, H, W, Cl) contiguous
  const void* global;      // (B, Hg, Wg, Cg) contiguous
  const void* weight;      // (C, Cl + Cg) in the storage of local
  Parameter branch_scale;  // (B)
  float* grad_mixed;       // (B, Hg, Wg, C)
  void* grad_local;        // (B, H, W, Cl)
  void* grad_global;       // (B, Hg, Wg, Cg)
  float* partials;         // (slots, C, Cl + Cg), then (slots, C), each value written once
  float* grad_weight;      // (C, Cl + Cg)
  float* grad_bias;        // (C)
};

// How a call is cut into blocks; from shape and layout alone.
struct UpsampleLaunch {
  static constexpr int threads = 128;
  static constexpr int block_rows = 64;     // of a product, pixels or cells
  static constexpr int block_columns = 64;  // of a product
  static constexpr int gather_packs = 8;    // of a block of the gather, neighbours
  static constexpr int gather_rows = threads / gather_packs;
  bool packed;             // 16 bytes per access to the arguments
  int64_t pixel_blocks;    // of products, down all B·H·W pixels
  int64_t cell_blocks;     // down all B·Hg·Wg cells
  int64_t mixed_blocks;    // across C
  int64_t local_blocks;    // across Cl
  int64_t global_blocks;   // across Cg
  int pack;                // channels of a thread of the gather
  int lanes;               // its threads that share the pixels of a cell
  int64_t gather_blocks;   // down all cells
  int64_t gather_groups;   // across C
  int64_t slots;           // partial sums of the weight's gradient
  int64_t pixels_of_slot;  // of B·H·W
  int64_t cells_of_slot;   // of B·Hg·Wg
};

inline std::string text(const UpsampleLaunch& l) {
  std::ostringstream out;
  out << "pixel blocks " << l.pixel_blocks << " x " << l.mixed_blocks << " and x " << l.local_blocks
      << ", cell blocks " << l.cell_blocks << " x " << l.mixed_blocks << " and x "
      << l.global_blocks << ", gather blocks " << l.gather_blocks << " x " << l.gather_groups
      << " with " << l.lanes << " lanes, slots " << l.slots << " of " << l.pixels_of_slot
      << " pixels and " << l.cells_of_slot << " cells, access "
      << (l.packed ? "16 bytes" : "one value");
  return out.str();
}

namespace detail {

// Threads for the pixels of a cell: each has some four, twice the ratio of the grids squared.
inline int gather_lanes(const UpsampleShape& shape) {
  const int64_t touched = 4 * shape.pixels / std::max<int64_t>(1, shape.cells);
  int lanes = 1;
  while (lanes < UpsampleLaunch::gather_rows && 4 * lanes < touched) lanes *= 2;
  return lanes;
}

inline UpsampleLaunch upsample_launch_for(
    const UpsampleShape& shape, Storage storage, std::initializer_list<const void*> data) {
  constexpr int64_t max_extent = 0x7fffffff;
  for (int64_t extent : {shape.height, shape.width, shape.global_height, shape.global_width,
           shape.weight_columns, shape.channels}) {
    if (extent > max_extent) {
      throw std::invalid_argument(
          "local: expected at most 2147483647 rows, columns and channels, got " +
          std::to_string(extent));
    }
  }
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto in_eights = [](int64_t channels) { return channels % 8 == 0; };
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  UpsampleLaunch l;
  l.packed = in_eights(shape.local_channels) && in_eights(shape.global_channels) &&
             in_eights(shape.channels) && std::all_of(data.begin(), data.end(), is_aligned);
  const int64_t pixels = shape.batch * shape.pixels, cells = shape.batch * shape.cells;
  l.pixel_blocks = divide_up(pixels, UpsampleLaunch::block_rows);
  l.cell_blocks = divide_up(cells, UpsampleLaunch::block_rows);
  l.mixed_blocks = divide_up(shape.channels, UpsampleLaunch::block_columns);
  l.local_blocks = divide_up(shape.local_channels, UpsampleLaunch::block_columns);
  l.global_blocks = divide_up(shape.global_channels, UpsampleLaunch::block_columns);

  l.pack = l.packed ? static_cast<int>(16 / bytes_of(storage)) : 1;
  l.lanes = gather_lanes(shape);
  l.gather_blocks = divide_up(cells * l.lanes, UpsampleLaunch::gather_rows);
  l.gather_groups = divide_up(shape.channels, UpsampleLaunch::gather_packs * l.pack);

  // Slots for 4 blocks on each of 132 multiprocessors, of at least 64 pixels (limit: each leaves a
  // whole matrix of partial sums).
  constexpr int64_t enough_blocks = 528, least_pixels = 64;
  const int64_t tiles = std::max<int64_t>(1, l.mixed_blocks * l.local_blocks);
  const int64_t most = std::max<int64_t>(1, divide_up(pixels, least_pixels));
  l.slots = std::clamp<int64_t>(divide_up(enough_blocks, tiles), 1, most);
  l.pixels_of_slot = divide_up(pixels, l.slots);
  l.cells_of_slot = divide_up(cells, l.slots);

  const int64_t widest = std::max({l.mixed_blocks, l.local_blocks, l.global_blocks});
  const int64_t blocks = std::max({l.pixel_blocks * widest, l.cell_blocks * widest,
      l.gather_blocks * l.gather_groups, l.slots * l.mixed_blocks * widest});
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument(
        "local: expected at most 2147483647 blocks of 64 pixels and 64 channels, got " +
        std::to_string(blocks));
  }
  return l;
}

}  // namespace detail

inline UpsampleLaunch upsample_launch(const UpsampleForward& args, Storage storage) {
  return detail::upsample_launch_for(args.shape, storage,
      {args.local, args.global, args.weight, args.bias.data, args.residual, args.out});
}

inline UpsampleLaunch upsample_launch(const UpsampleBackward& args, Storage storage) {
  return detail::upsample_launch_for(args.shape, storage,
      {args.grad, args.local, args.global, args.weight, args.grad_local, args.grad_global});
}

// Both enqueue on `stream` and throw std::runtime_error where CUDA refuses. They take at least one
// image and one channel of each kind.
void upsample_forward(
    const UpsampleForward& args, Storage storage, const UpsampleLaunch& l, CUstream_st* stream);
// args.partials has room for l.slots · C · (Cl + Cg + 1) values.
void upsample_backward(
    const UpsampleBackward& args, Storage storage, const UpsampleLaunch& l, CUstream_st* stream);

}  // namespace dsnet::cuda
