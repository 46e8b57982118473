// A packed weight and its bias in the memory of one tensor.
#pragma once

#include "bindings/cpu/workspace.h"
#include "cpu/packed_product.h"

namespace dsnet {

// The bias, then the panels, of `outputs` columns and `depth` rows.
struct PackedWeight {
  void *bias_row, *panels;

  PackedWeight(void* memory, int64_t item, int64_t outputs)
      : bias_row(memory), panels(static_cast<char*>(memory) + cpu::padded(outputs) * item) {}

  // Accumulators that it takes.
  static int64_t size(int64_t outputs, int64_t depth) { return cpu::padded(outputs) * (depth + 1); }
};

inline OptionalTensor contiguous_of(const OptionalTensor& parameter) {
  return parameter.has_value() ? OptionalTensor(as_contiguous(*parameter)) : std::nullopt;
}

inline cpu::Parameter optional_view_of(
    const Workspace& space, const char* name, const OptionalTensor& contiguous) {
  return contiguous.has_value() ? space.view_of(name, *contiguous) : cpu::Parameter{nullptr, false};
}

}  // namespace dsnet
