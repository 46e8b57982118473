// Gradients of weights: products summed over tokens. Arguments and tasks; no torch here.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace dsnet::cpu {

// out (rows, columns) = factor · leftᵀ·right, and the sums of left itself.
struct TokenProduct {
  static constexpr int64_t row_block = 28;  // of a task
  static constexpr int64_t depth = 128;     // tokens summed at a time
  const void* left;                         // (tokens, left_stride), as stored or accumulators
  const void* right;                        // (tokens, right_stride) accumulators
  void* out;                                // rows at out_stride
  void* sums;                               // (rows), or null
  const void* weights;                      // (tokens) in sums, or null for 1
  int64_t tokens, rows, columns;
  int64_t left_stride, right_stride, out_stride;
  double factor = 1;
  bool left_is_stored = false;

  int64_t tasks() const { return (rows + row_block - 1) / row_block; }
  static int64_t scratch(int64_t columns) { return row_block * (depth + padded(columns)); }
};

}  // namespace dsnet::cpu
