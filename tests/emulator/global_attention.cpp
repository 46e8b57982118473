// Python module: the global attention's kernels and bindings for a GPU, in the emulator.
#include "cuda/global_attention.cu"
#include "cuda/global_attention_backward.cu"
#include "cuda/sum_slots.cu"

#include "operation.h"

namespace dsnet::cuda {

template <typename Visit>
void visit_fields(AttentionLaunch& l, const Visit& visit) {
  visit("fused", l.fused);
  visit("packed", l.packed);
  visit("head_tile", l.head_tile);
  visit("fused_threads", l.fused_threads);
  visit("row_tiles", l.row_tiles);
  visit("token_blocks", l.token_blocks);
  visit("column_blocks", l.column_blocks);
  visit("slots", l.slots);
  visit("slot_rows", l.slot_rows);
}

}  // namespace dsnet::cuda

#define attention_launch(...) with_replaced_fields(attention_launch(__VA_ARGS__))
#include "bindings/cuda/global_attention.cpp"
#undef attention_launch

namespace py = pybind11;
using namespace dsnet::cuda;
namespace emulator = dsnet::emulator;

PYBIND11_MODULE(emulator_global_attention, m) {
  emulator::bind_operation(m);
  m.def("launches", [](const std::array<int64_t, 3>& extents, int64_t heads, uintptr_t address) {
    const auto [batch, tokens, width] = extents;
    auto* const data = emulator::at<void>(address);
    AttentionForward forward{};
    AttentionBackward backward{};
    forward.shape = backward.shape = AttentionShape{batch, tokens, heads, width / heads};
    forward.inputs.x = forward.inputs.qkv_weight = data;
    backward.inputs = forward.inputs;
    backward.grad = data;
    py::list found;
    for (const AttentionLaunch& l : {attention_launch(forward), attention_launch(backward)}) {
      py::object launch = emulator::as_object(l);
      launch.attr("block_rows") = int{AttentionLaunch::block_rows};
      launch.attr("block_columns") = int{AttentionLaunch::block_columns};
      launch.attr("attention_blocks") = l.attention_blocks();
      launch.attr("projection_blocks") = l.projection_blocks();
      found.append(launch);
    }
    return found;
  });
}
