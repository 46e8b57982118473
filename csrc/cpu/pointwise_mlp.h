// The block's MLP on the CPU: arguments, tasks and entry points. No torch here.
//
// Both products are transposed: weights are the left operand, which is read where it lies, and the
// right one is a panel of tokens, channel by channel. So no weight is packed, and the hidden
// activations leave the registers as the panel that the second product reads.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"

namespace dsnet::cpu {

struct MlpShape {
  int64_t batch, height, width;
  int64_t channels;  // C
  int64_t hidden;    // R
  int64_t image() const { return height * width; }
  int64_t tokens() const { return batch * image(); }
};

// (tokens, C) with channels next to each other; the stride in elements.
struct Tokens {
  const void* data;
  int64_t stride;
};

// A weight (rows, columns) as the left operand of products: accumulators, or pairs of bfloat16
// along the columns in their words. Where it does not lie like that, it is staged in `memory`.
struct MlpWeight {
  Parameter weight;
  int64_t rows, columns;
  bool transposed;  // the operand, not the weight
  void* memory;     // null: as it lies
  int64_t stride;   // of the operand's rows, in words

  int64_t depth() const { return transposed ? rows : columns; }
  int64_t operand_rows() const { return transposed ? columns : rows; }
  const void* data() const { return memory == nullptr ? weight.data : memory; }
};

// Tokens are handled in vectors of `lanes`, some of them at a time.
struct MlpLayout {
  static constexpr int64_t block = 3 * lanes;      // tokens of a panel of products, at most
  static constexpr int64_t row_unit = 8;           // rows of a weight's gradient, of a task
  static constexpr int64_t row_block = 28;         // likewise, multiplied together
  static constexpr int64_t depth = 128;            // tokens summed at a time in it
  static constexpr int64_t chunk_bytes = 6 << 20;  // of hidden activations, about
  static constexpr int64_t stage_rows = 16;        // rows of a staged operand
  static constexpr int64_t column_sums = 3;        // gradients of scale, shift, second bias
  static constexpr int64_t shared_vectors = 16;    // threads share tokens up to so many
  static constexpr int64_t shared_rows = 14;       // rows of a weight, then, of a task

  explicit MlpLayout(const MlpShape& shape)
      : channels(padded(shape.channels)),
        hidden((shape.hidden + 1) / 2 * 2),
        vectors((shape.tokens() + lanes - 1) / lanes) {
    // Both hidden activations and their gradients.
    const int64_t fitting = chunk_bytes / (2 * 4 * hidden * block) * (block / lanes);
    chunk = fitting > block / lanes ? fitting : block / lanes;
    chunk = chunk < vectors ? chunk : vectors;
  }

  int64_t channels;  // C in whole registers
  int64_t hidden;    // R in whole pairs
  int64_t vectors;
  int64_t chunk;  // vectors of which the backward keeps hidden activations

  bool is_shared() const { return vectors <= shared_vectors; }
  int64_t chunk_tokens() const { return chunk * lanes; }

  int64_t forward_scratch() const {
    return block * (2 * channels + hidden) + lanes * channels + 4 * lanes;
  }
  int64_t backward_scratch() const {
    return block * (3 * channels + 2 * hidden) + 2 * lanes * channels + 7 * lanes;
  }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct MlpForward {
  MlpShape shape;
  Tokens x;
  MlpWeight fc1, fc2;               // (R, C), (C, R)
  const void *scale, *shift;        // (C), both or neither null
  const void *fc1_bias, *fc2_bias;  // (R), (C)
  Parameter factors;                // (B), may be null
  void* hidden;                     // (vectors, R, lanes) as stored: before GELU; may be null
  void* out;                        // (tokens, C) contiguous, as stored
  // Of all tokens, where threads share them:
  void* panels;       // (C, vectors · lanes) in panels
  void* activations;  // (R, vectors · lanes) in panels
  void* sums;         // (C, vectors · lanes)
};

struct MlpBackward {
  MlpShape shape;
  Tokens grad, x;
  const void* hidden;                        // what the forward kept; null: recomputed
  MlpWeight fc1;                             // where hidden is null
  MlpWeight fc1_transposed, fc2_transposed;  // (C, R), (R, C)
  const void *scale, *shift;                 // (C), both or neither null
  const void* fc1_bias;                      // (R)
  Parameter factors;                         // (B), may be null
  int64_t first, vectors;                    // of this chunk
  void* activations;          // (R, chunk tokens): GELU, words of pairs or accumulators
  void* grad_hidden;          // likewise: gradient before GELU
  void* inputs;               // (chunk tokens, C) in panels: scale·x + shift
  void* grads;                // likewise: factor·grad
  void* column_sums;          // (vectors, column_sums, layout.channels)
  void *fc1_sums, *fc2_sums;  // (R, layout.channels): the second transposed
  double* bias_sums;          // (R)
  void* grad_x;               // (tokens, C) contiguous, as stored
  void *grad_fc1_weight, *grad_fc1_bias, *grad_fc2_weight;  // (R, C), (R), (C, R)
  void *grad_fc2_bias, *grad_scale, *grad_shift;            // (C)
};

struct MlpForwardKernels {
  bool pairs;             // whether products are of pairs of bfloat16
  Step<MlpWeight> stage;  // stage_rows rows a task
  Step<MlpForward> run;   // a vector a task: everything else
  // The same in steps, where threads share the tokens:
  Step<MlpForward> put;     // a vector a task: panels
  Step<MlpForward> first;   // shared_rows rows of fc1 a task: activations
  Step<MlpForward> second;  // shared_rows rows of fc2 a task: sums
  Step<MlpForward> take;    // a vector a task: out
};

struct MlpBackwardKernels {
  bool pairs;
  Step<MlpWeight> stage;      // stage_rows rows a task
  Step<MlpBackward> tokens;   // a vector of the chunk a task: gradient of x, what weights need
  Step<MlpBackward> weights;  // row_unit rows a task: the chunk's share of the weights' gradients
  Step<MlpBackward> finish;   // a register of channels a task: gradients of parameters as returned
};

MlpForwardKernels pointwise_mlp_forward(Capability capability, Storage storage);
MlpBackwardKernels pointwise_mlp_backward(Capability capability, Storage storage);

}  // namespace dsnet::cpu
