// Python module: the kernels and bindings of upsampling and concatenation for a GPU, in the
// emulator.
#include "cuda/upsample_concat.cu"
#include "cuda/sum_slots.cu"
#include "cuda/upsample_concat_backward.cu"

#include "operation.h"

namespace dsnet::cuda {

template <typename Visit>
void visit_fields(UpsampleLaunch& l, const Visit& visit) {
  visit("packed", l.packed);
  visit("pixel_blocks", l.pixel_blocks);
  visit("cell_blocks", l.cell_blocks);
  visit("mixed_blocks", l.mixed_blocks);
  visit("local_blocks", l.local_blocks);
  visit("global_blocks", l.global_blocks);
  visit("pack", l.pack);
  visit("lanes", l.lanes);
  visit("gather_blocks", l.gather_blocks);
  visit("gather_groups", l.gather_groups);
  visit("slots", l.slots);
  visit("pixels_of_slot", l.pixels_of_slot);
  visit("cells_of_slot", l.cells_of_slot);
}

}  // namespace dsnet::cuda

#define upsample_launch(...) with_replaced_fields(upsample_launch(__VA_ARGS__))
#include "bindings/cuda/upsample_concat.cpp"
#undef upsample_launch

namespace py = pybind11;
using namespace dsnet::cuda;
namespace emulator = dsnet::emulator;

PYBIND11_MODULE(emulator_upsample_concat, m) {
  emulator::bind_operation(m);
  m.def("launches", [](const std::array<int64_t, 8>& e, Storage storage, uintptr_t address) {
    auto* const data = emulator::at<void>(address);
    UpsampleForward forward{};
    UpsampleBackward backward{};
    forward.shape = backward.shape = UpsampleShape{e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]};
    forward.local = forward.global = forward.weight = forward.out = data;
    backward.grad = backward.local = backward.global = backward.weight = data;
    backward.grad_local = backward.grad_global = data;
    py::list found;
    for (const UpsampleLaunch& l :
        {upsample_launch(forward, storage), upsample_launch(backward, storage)}) {
      py::object launch = emulator::as_object(l);
      launch.attr("block_rows") = int{UpsampleLaunch::block_rows};
      launch.attr("block_columns") = int{UpsampleLaunch::block_columns};
      launch.attr("gather_packs") = int{UpsampleLaunch::gather_packs};
      launch.attr("gather_rows") = int{UpsampleLaunch::gather_rows};
      found.append(launch);
    }
    return found;
  });
}
