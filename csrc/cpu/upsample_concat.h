// Upsampling of the global stream, concatenation and mixing on the CPU: arguments, tasks and entry
// points. No torch here.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"
#include "packed_product.h"
#include "taps.h"

namespace dsnet::cpu {

struct UpsampleShape {
  int64_t batch;
  int64_t height, width;
  int64_t global_height, global_width;
  int64_t local_channels, global_channels;
  int64_t channels;  // C, of the output
  int64_t rows() const { return batch * height; }
  int64_t global_rows() const { return batch * global_height; }
  int64_t global_tokens() const { return global_rows() * global_width; }
  int64_t weight_columns() const { return local_channels + global_channels; }
};

// How matrices lie in memory and how a call is cut into tasks; from the shape alone.
struct UpsampleLayout {
  static constexpr int64_t block = 56;  // tokens of a product, so that they stay in cache

  explicit UpsampleLayout(const UpsampleShape& shape)
      : channels(padded(shape.channels)),
        local(padded(shape.local_channels)),
        global(padded(shape.global_channels)),
        packs(channels / lanes) {}

  // Row strides, in whole registers.
  int64_t channels, local, global;
  int64_t packs;

  ProductTasks global_tasks(const UpsampleShape& shape) const {
    return {shape.global_tokens(), shape.channels, block};
  }
  int64_t scratch(const UpsampleShape& shape) const {
    const int64_t most = local > global ? local : global;
    const int64_t rows = shape.global_width * channels;
    return most * block + rows + lanes;
  }
};

// The same for the backward alone.
struct UpsampleBackwardLayout {
  static constexpr int64_t chunk = 112;        // tokens of a product, about
  static constexpr int64_t slot_tokens = 448;  // least tokens of a slot, about
  static constexpr int64_t least_slots = 4, most_slots = 64;
  static constexpr int64_t weight_block = 28;   // rows of the weight's gradient
  static constexpr int64_t weight_depth = 448;  // tokens summed at a time

  UpsampleBackwardLayout() = default;
  explicit UpsampleBackwardLayout(const UpsampleShape& shape) {
    const int64_t rows = shape.rows();
    // The slots' sums shall be small beside the gradient.
    const int64_t wide = 2 * shape.local_channels;
    const int64_t tokens = wide > slot_tokens ? wide : slot_tokens;
    slots = rows * shape.width / tokens;
    slots = slots < least_slots ? least_slots : slots > most_slots ? most_slots : slots;
    slots = slots < rows ? slots : rows;
    slot_rows = (rows + slots - 1) / slots;
    slots = (rows + slot_rows - 1) / slot_rows;
    chunk_rows = chunk / shape.width > 1 ? chunk / shape.width : 1;
    chunk_rows = chunk_rows < slot_rows ? chunk_rows : slot_rows;
    global_block_rows = UpsampleLayout::block / shape.global_width;
    global_block_rows = global_block_rows > 1 ? global_block_rows : 1;
    global_blocks = (shape.global_rows() + global_block_rows - 1) / global_block_rows;
    weight_blocks = (shape.channels + weight_block - 1) / weight_block;
  }

  // Rows of all images follow one another.
  int64_t slot_rows;  // of one task, which has its own sums
  int64_t slots;
  int64_t chunk_rows;  // handled together
  int64_t global_block_rows, global_blocks;
  int64_t weight_blocks;

  // Coarse rows that the slots write to: neighbours share at most two.
  int64_t sum_rows(const UpsampleShape& shape) const { return shape.global_rows() + 2 * slots; }

  int64_t scratch(const UpsampleShape& shape, const UpsampleLayout& layout) const {
    const int64_t tokens = chunk_rows * shape.width;
    const int64_t streams =
        tokens * (2 * layout.channels + layout.local) + (shape.global_width + 3) * layout.channels;
    const int64_t weights =
        weight_block * (weight_depth + layout.global) + weight_depth * layout.global;
    return streams > weights ? streams : weights;
  }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct UpsampleForward {
  UpsampleShape shape;
  Pixels local, global, residual;   // residual may be null
  Parameter weight, bias, factors;  // bias and factors may be null
  Taps rows, columns;
  void* bias_row;       // (layout.channels)
  void* packed_local;   // (Cl, layout.channels) in panels: the weight, transposed
  void* packed_global;  // (Cg, layout.channels) likewise
  void* mixed;          // (B, Hg, Wg, layout.channels): the weight times global
  void* out;            // (B, H, W, C) contiguous, as stored
};

struct UpsampleBackward {
  UpsampleShape shape;
  UpsampleBackwardLayout cut;
  Pixels grad, local, global;
  Parameter weight, factors;  // factors may be null
  Taps rows, columns;
  void* packed_local;   // (C, layout.local) in panels: the weight
  void* packed_global;  // (C, layout.global) likewise
  void* weight_sums;    // (slots, C, layout.local)
  double* bias_sums;    // (slots, layout.channels)
  void* coarse_sums;    // (sum_rows, Wg, layout.channels)
  void* grad_mixed;     // (B, Hg, Wg, layout.channels)
  void* global_values;  // (B, Hg, Wg, layout.global), zero behind the last channel
  void* grad_local;     // (B, H, W, Cl) contiguous, as stored
  void* grad_global;    // (B, Hg, Wg, Cg) contiguous, as stored
  void* grad_weight;    // (C, Cl + Cg)
  void* grad_bias;      // (C)
};

struct UpsampleForwardKernels {
  Step<UpsampleForward> pack;        // layout.packs tasks
  Step<UpsampleForward> mix_global;  // layout.global_tasks
  Step<UpsampleForward> mix;         // B · H tasks: everything else
};

struct UpsampleBackwardKernels {
  Step<UpsampleBackward> pack;           // (layout.local + layout.global) / lanes tasks
  Step<UpsampleBackward> local_stream;   // cut.slots tasks: gradient of local, sums for the others
  Step<UpsampleBackward> global_stream;  // cut.global_blocks tasks: gradient of global
  Step<UpsampleBackward> weights;        // cut.weight_blocks tasks: of weight and bias
};

UpsampleForwardKernels upsample_concat_forward(Capability capability, Storage storage);
UpsampleBackwardKernels upsample_concat_backward(Capability capability, Storage storage);

}  // namespace dsnet::cpu
