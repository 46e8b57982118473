// Python module: co-attention's kernels and bindings for a GPU, in the emulator.
#include "cuda/co_attention.cu"
#include "cuda/co_attention_backward.cu"
#include "cuda/co_attention_backward_keys.cu"
#include "cuda/co_attention_global.cu"
#include "cuda/global_attention.cu"
#include "cuda/global_attention_backward.cu"
#include "cuda/sum_slots.cu"

#include "operation.h"

namespace dsnet::cuda {

template <typename Visit>
void visit_fields(CoAttentionLaunch& l, const Visit& visit) {
  visit("absorbed", l.absorbed);
  visit("folds", l.folds);
  visit("copies_tokens", l.copies_tokens);
  visit("copies_grad", l.copies_grad);
  visit("packed", l.packed);
  visit("columns", l.columns);
  visit("column_tile", l.column_tile);
  visit("local_tiles", l.local_tiles);
  visit("global_tiles", l.global_tiles);
  visit("splits", l.splits);
  visit("split_rows", l.split_rows);
  visit("slots", l.slots);
}

}  // namespace dsnet::cuda

#define co_attention_launch(...) with_replaced_fields(co_attention_launch(__VA_ARGS__))
#include "bindings/cuda/co_attention.cpp"
#undef co_attention_launch

namespace py = pybind11;
using namespace dsnet::cuda;
namespace emulator = dsnet::emulator;

PYBIND11_MODULE(emulator_co_attention, m) {
  emulator::bind_operation(m);
  m.def("launches", [](const std::array<int64_t, 7>& e, int absorbed, uintptr_t address) {
    auto* const data = emulator::at<void>(address);
    CoAttentionForward forward{};
    CoAttentionBackward backward{};
    forward.shape = backward.shape = CoAttentionShape{e[0], e[1], e[2], e[3], e[4], e[5], e[6]};
    forward.inputs.local = forward.inputs.global = data;
    backward.inputs = forward.inputs;
    forward.out_local = backward.out_local = data;
    backward.grad_local = backward.grad_global = data;
    py::list found;
    for (const CoAttentionLaunch& l :
        {co_attention_launch(forward, absorbed), co_attention_launch(backward, absorbed)}) {
      py::object launch = emulator::as_object(l);
      launch.attr("block_rows") = int{CoAttentionLaunch::block_rows};
      launch.attr("backward_workspace") = co_attention_workspace(backward, Storage::float32, l);
      found.append(launch);
    }
    return found;
  });
}
