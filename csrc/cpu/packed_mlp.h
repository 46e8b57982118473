// The block's MLP with packed weights on the CPU: arguments, tasks and entry points. No torch here.
//
// Tokens are rows of the left operand as they lie, and so are the hidden activations.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"
#include "packed_product.h"

namespace dsnet::cpu {

struct PackedMlpShape {
  int64_t tokens;
  int64_t channels;  // C
  int64_t hidden;    // R
};

// Few tokens are multiplied in two steps, between which the threads meet, so that each reads a part
// of the weights alone; of many, a block goes through both products while it is in the cache.
struct PackedMlpLayout {
  static constexpr int64_t few_tokens = 392;
  static constexpr int64_t cached = 160 << 10;  // accumulators of a block, about

  explicit PackedMlpLayout(const PackedMlpShape& shape)
      : hidden(padded(shape.hidden)),
        is_few(shape.tokens <= few_tokens),
        blocks(shape.tokens, 0, block_of(shape)) {}

  int64_t hidden;  // stride of activations
  bool is_few;
  ProductTasks blocks;  // of many tokens

  static int64_t block_of(const PackedMlpShape& shape) {
    const int64_t fitting = cached / (padded(shape.hidden) + 2 * padded(shape.channels));
    return fitting < 28 ? 28 : fitting > 112 ? 112 : fitting;
  }
  int64_t scratch(const PackedMlpShape& shape) const {
    const int64_t block = is_few ? ProductTasks(shape.tokens, shape.hidden).block : blocks.block;
    return block * (padded(shape.channels + 1) + hidden) + lanes;
  }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct PackedMlp {
  PackedMlpShape shape;
  const void* x;                    // (tokens, C) contiguous, as stored
  const void *fc1, *fc2;            // (C, padded R) and (R, padded C) in panels
  const void *fc1_bias, *fc2_bias;  // (padded R), (padded C)
  void* activations;                // (tokens, layout.hidden), of few tokens
  void* out;                        // (tokens, C) contiguous, as stored
};

struct PackedMlpKernels {
  Step<PackedMlp> run;  // layout.blocks.blocks tasks
  // Of few tokens, the tasks of their products:
  Step<PackedMlp> first;
  Step<PackedMlp> second;
};

PackedMlpKernels packed_mlp(Capability capability, Storage storage);

}  // namespace dsnet::cpu
