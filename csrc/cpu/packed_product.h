// Products of tokens and a weight that was packed once, for as many calls as follow: arguments and
// tasks. No torch here.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace dsnet::cpu {

// Columns [offset, offset + count) of a weight (outputs, stride) and its bias, to be packed: a task
// for each 16 outputs.
struct WeightPacking {
  Parameter weight, bias;  // the bias may be null
  int64_t outputs, stride, offset, count;
  void* packed;    // (count, padded outputs) in panels, accumulators or words of pairs
  void* bias_row;  // (padded outputs)
  int64_t tasks() const { return padded(outputs) / lanes; }
  int64_t scratch() const { return lanes * padded(count + 1); }
};

// How a product is cut into tasks; from the shape alone: blocks of tokens and, where these are few,
// panels of outputs. Tasks of the same outputs follow one another, so that a thread reads few
// weights.
struct ProductTasks {
  static constexpr int64_t tile = 7;           // tokens of a tile of sums in the widest registers
  static constexpr int64_t panel = 3 * lanes;  // its outputs
  static constexpr int64_t enough = 8;         // blocks

  ProductTasks(int64_t tokens, int64_t outputs, int64_t most_block = 112) {
    blocks = (tokens + most_block - 1) / most_block;
    if (blocks < enough) blocks += blocks % 2;
    const int64_t share = blocks > 0 ? (tokens + blocks - 1) / blocks : tile;
    block = (share + tile - 1) / tile * tile;
    blocks = (tokens + block - 1) / block;
    groups = blocks < enough ? (padded(outputs) + panel - 1) / panel : 1;
  }

  int64_t block, blocks, groups;
  int64_t count() const { return blocks * groups; }
};

}  // namespace dsnet::cpu
