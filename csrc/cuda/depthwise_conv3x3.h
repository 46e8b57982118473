// Depthwise 3×3 convolution on the GPU: arguments, launch configuration, launchers. For any C++
// compiler; no torch and no CUDA here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/divide_up.h"
#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet::cuda {

// (B, C, H, W) with channels next to each other; strides in elements.
struct Pixels {
  const void* data;
  int64_t stride_batch;
  int64_t stride_row;
  int64_t stride_column;
};

struct DepthwiseShape {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
};

struct DepthwiseForward {
  DepthwiseShape shape;
  Pixels x;
  Parameter weight;  // (C, 9)
  Parameter bias;    // (C)
  Parameter scale;   // (C)
  Parameter shift;   // (C)
  bool residual;
  void* out;  // (B, H, W, C) contiguous
};

struct DepthwiseBackward {
  static constexpr int gradient_rows = 12;  // nine taps, bias, scale, shift
  DepthwiseShape shape;
  Pixels grad;
  Pixels x;
  Parameter weight;  // (C, 9)
  Parameter scale;   // (C)
  Parameter shift;   // (C)
  bool residual;
  void* grad_x;     // (B, H, W, C) contiguous
  float* partials;  // (slots, gradient_rows, C), each value written once
  float* rows;      // (gradient_rows, C)
};

// How a call is cut into blocks; from shape and layout alone, so that sums do not depend on the
// GPU. Block i handles channel group i % groups, then strip, then columns.
struct DepthwiseLaunch {
  static constexpr int threads = 128;
  static constexpr int max_block_channels = 128;
  int pack;               // channels per thread
  int threads_x;          // packs of a block
  int threads_y;          // columns of a block
  int64_t groups;         // blocks across the channels
  int64_t strips;         // blocks down the rows
  int64_t rows;           // of a strip
  int64_t column_blocks;  // blocks along the B·W columns
  int64_t repeats;        // columns of a thread

  // Blocks with the same channels, each of which leaves partial sums in the backward.
  int64_t slots() const { return strips * column_blocks; }
  int64_t blocks() const { return groups * slots(); }
};

inline std::string text(const DepthwiseLaunch& l) {
  std::ostringstream out;
  out << "pack " << l.pack << ", threads " << l.threads_x << " x " << l.threads_y << ", groups "
      << l.groups << ", strips " << l.strips << " of " << l.rows << " rows, column blocks "
      << l.column_blocks << ", repeats " << l.repeats << ", blocks " << l.blocks();
  return out.str();
}

namespace detail {

inline bool is_aligned(const void* data, size_t to) {
  return reinterpret_cast<uintptr_t>(data) % to == 0;
}

inline bool is_aligned(const Pixels& pixels, const DepthwiseShape& shape, size_t item, size_t to) {
  const auto multiple = [&](int64_t size, int64_t stride) {
    return size == 1 || static_cast<size_t>(stride) * item % to == 0;
  };
  return is_aligned(pixels.data, to) && multiple(shape.batch, pixels.stride_batch) &&
         multiple(shape.height, pixels.stride_row) && multiple(shape.width, pixels.stride_column);
}

// Packs that an instruction moves, of `pack` channels where layout and C allow it, else of one.
inline DepthwiseLaunch launch_for(
    const DepthwiseShape& shape, bool is_packed, int pack, int64_t max_blocks) {
  constexpr int64_t max_extent = 0x7fffffff;
  if (shape.height > max_extent || shape.width > max_extent) {
    throw std::invalid_argument("x: expected at most 2147483647 rows and columns, got " +
                                std::to_string(shape.height) + " and " +
                                std::to_string(shape.width));
  }
  DepthwiseLaunch l;
  l.pack = is_packed && shape.channels % pack == 0 ? pack : 1;

  // Neighbouring threads on neighbouring channels, at least 64 bytes where C has them (limit: whole
  // 32-byte sectors), with the fewest idle in the last group.
  const int64_t packs = shape.channels / l.pack;
  const int widest = l.pack == 1 ? 64 : 16;
  l.threads_x = static_cast<int>(std::min<int64_t>(packs, widest));
  for (int x = l.threads_x - 1; x > widest / 2 - 1; --x) {
    if (divide_up(packs, x) * x < divide_up(packs, l.threads_x) * l.threads_x) l.threads_x = x;
  }
  l.threads_y = DepthwiseLaunch::threads / l.threads_x;
  l.groups = divide_up(packs, l.threads_x);

  // Strips only while the columns alone leave multiprocessors idle, of at least 8 rows (limit: the
  // two halo rows that each strip loads again).
  constexpr int64_t enough_blocks = 1056;  // 8 for each of 132 multiprocessors
  const int64_t all_columns = std::max<int64_t>(1, shape.batch * shape.width);
  const int64_t column_blocks = divide_up(all_columns, l.threads_y);
  const int64_t strips = std::clamp<int64_t>(divide_up(enough_blocks, l.groups * column_blocks), 1,
      std::max<int64_t>(1, shape.height / 8));
  l.rows = divide_up(shape.height, strips);
  l.strips = divide_up(shape.height, l.rows);

  // More columns per thread past max_blocks.
  l.repeats = divide_up(l.groups * l.strips * column_blocks, max_blocks);
  l.column_blocks = divide_up(column_blocks, l.repeats);
  return l;
}

}  // namespace detail

// 16 bytes per thread and load. Limit on blocks: the x dimension of a grid.
inline DepthwiseLaunch depthwise_launch(const DepthwiseForward& args, Storage storage) {
  constexpr int access = 16;
  const size_t item = bytes_of(storage);
  const bool is_packed =
      detail::is_aligned(args.x, args.shape, item, access) && detail::is_aligned(args.out, access);
  return detail::launch_for(args.shape, is_packed, access / static_cast<int>(item), 0x7fffffff);
}

// Four channels per thread: taps and sums of more do not fit its registers. Limit on blocks: 3 for
// each of 132 multiprocessors run at once, and more only leave more partial sums.
inline DepthwiseLaunch depthwise_launch(const DepthwiseBackward& args, Storage storage) {
  constexpr int pack = 4;
  const size_t item = bytes_of(storage);
  const bool is_packed = detail::is_aligned(args.x, args.shape, item, pack * item) &&
                         detail::is_aligned(args.grad, args.shape, item, pack * item) &&
                         detail::is_aligned(args.grad_x, pack * item);
  return detail::launch_for(args.shape, is_packed, pack, 396);
}

// Both enqueue on `stream` and throw std::runtime_error where CUDA refuses. An empty batch has zero
// rows.
void depthwise_forward(
    const DepthwiseForward& args, Storage storage, const DepthwiseLaunch& l, CUstream_st* stream);
// args.partials has room for l.slots() · gradient_rows · C values.
void depthwise_backward(
    const DepthwiseBackward& args, Storage storage, const DepthwiseLaunch& l, CUstream_st* stream);

}  // namespace dsnet::cuda
