// Depthwise 3×3 convolution on the CPU: arguments and entry points. No torch here.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"

namespace dsnet::cpu {

struct DepthwiseShape {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
};

// How a call is cut into tasks; from the shape alone, so that sums do not depend on threads.
struct DepthwiseTasks {
  static constexpr int64_t rows_per_strip = 8;
  static constexpr int64_t channels_per_block = 128;
  int64_t strips;
  int64_t blocks;
  int64_t count;  // batch · strips · blocks, in this order
  int64_t grain;  // least tasks worth a thread

  explicit DepthwiseTasks(const DepthwiseShape& shape);
};

// Coefficients are accumulators (double for float64, else float), for each 16 channels the rows
// below one after another, the last channels padded; so all of a register's are at fixed offsets.
constexpr int64_t coefficient_lanes = 16;

// Rows:
//   forward   9 taps w·scale, 3 × 3 constants bias + rest·Σ w over the taps inside the image, for
//   the
//             first / an inner / the last row × column, then the centre. A dimension of size 1 has
//             its outer taps zeroed. scale·x + shift is taken as scale·(x − centre) + rest, with
//             centre = −shift / scale and rest what rounding leaves: folding all of shift into the
//             constants would round at |scale·x|, not at its sum with shift.
//   backward  9 taps w, then scale, centre and rest.
struct DepthwiseForward {
  static constexpr int64_t coefficient_rows = 19;
  DepthwiseShape shape;
  Pixels x;
  const void* coefficients;
  bool is_centred;  // false: every centre is 0
  bool residual;
  void* out;  // (B, H, W, C) contiguous
};

struct DepthwiseBackward {
  static constexpr int64_t coefficient_rows = 12;
  static constexpr int64_t gradient_rows = 12;  // 9 taps, bias, scale, shift
  DepthwiseShape shape;
  Pixels grad;
  Pixels x;
  const void* coefficients;
  bool residual;
  void* grad_x;    // (B, H, W, C) contiguous
  void* partials;  // (B · strips, gradient_rows, C) accumulators, each slot written once
};

// Runs tasks [begin, end).
using DepthwiseForwardKernel = void (*)(const DepthwiseForward&, int64_t begin, int64_t end);
using DepthwiseBackwardKernel = void (*)(const DepthwiseBackward&, int64_t begin, int64_t end);

DepthwiseForwardKernel depthwise_forward(Capability capability, Storage storage);
DepthwiseBackwardKernel depthwise_backward(Capability capability, Storage storage);

}  // namespace dsnet::cpu
