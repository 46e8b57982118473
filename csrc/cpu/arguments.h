// What the arguments of kernels are made of. No torch here.
#pragma once

#include <cstdint>

#include "storage.h"

namespace dsnet::cpu {

constexpr int64_t lanes = 16;  // of the widest register
constexpr int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// (B, C, H, W) with channels next to each other; strides in elements.
struct Pixels {
  const void* data;
  int64_t stride_batch;
  int64_t stride_row;
  int64_t stride_column;
};

// Contiguous values: accumulators (double for float64, else float), or of the activations' dtype.
struct Parameter {
  const void* data;
  bool is_accumulator;
};

struct AttentionDropout {
  double p;
  uint64_t seed;
};

// Runs tasks [begin, end); scratch belongs to the calling thread.
template <typename Arguments>
using Step = void (*)(const Arguments&, void* scratch, int64_t begin, int64_t end);

}  // namespace dsnet::cpu
