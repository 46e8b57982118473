// Convolutions of patches and 1×1 convolutions of a downsampled image on the CPU: arguments, tasks
// and entry points. No torch here.
//
// A token's inputs, a patch's pixels after one another or a bilinear sample, are a row of the left
// operand; the weight is packed once, for as many calls as follow.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"
#include "packed_product.h"
#include "taps.h"

namespace dsnet::cpu {

struct PatchConvShape {
  int64_t batch, height, width;  // of the output
  int64_t channels;              // C, of the input
  int64_t patch;                 // pixels of a side, and from one patch to the next
  int64_t outputs;               // O
  int64_t tokens() const { return batch * height * width; }
  int64_t depth() const { return patch * patch * channels; }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct PatchConv {
  PatchConvShape shape;
  Pixels x;
  int64_t stride_channel;  // of x
  bool is_tokens;          // whether x is (tokens, C) contiguous and patches are pixels
  Taps rows, columns;      // of samples; without: patches
  const void* packed;      // (depth, padded outputs) in panels
  const void* bias_row;    // (padded outputs)
  void* gathered;          // (tokens, row()), where gathers_first()
  void* out;               // (B, H, W, O) contiguous, as stored

  ProductTasks tasks() const { return {shape.tokens(), shape.outputs}; }
  int64_t row() const { return padded(shape.depth() + 1); }  // of the left operand
  int64_t scratch() const { return (tasks().block + 1) * row(); }
  // Otherwise each task gathers its tokens' inputs.
  bool gathers_first() const { return !is_tokens && tasks().groups > 1; }
};

struct PatchConvKernels {
  Step<WeightPacking> pack;
  Step<PatchConv> gather;  // a token a task
  Step<PatchConv> run;     // tasks()
};

PatchConvKernels patch_conv(Capability capability, Storage storage);

}  // namespace dsnet::cpu
