// Python module: the depthwise convolution's kernels and bindings for a GPU, in the emulator.
#include "cuda/depthwise_conv3x3.cu"
#include "cuda/sum_slots.cu"

#include "operation.h"

namespace dsnet::cuda {

template <typename Visit>
void visit_fields(DepthwiseLaunch& l, const Visit& visit) {
  visit("pack", l.pack);
  visit("threads_x", l.threads_x);
  visit("threads_y", l.threads_y);
  visit("groups", l.groups);
  visit("strips", l.strips);
  visit("rows", l.rows);
  visit("column_blocks", l.column_blocks);
  visit("repeats", l.repeats);
}

}  // namespace dsnet::cuda

#define depthwise_launch(...) with_replaced_fields(depthwise_launch(__VA_ARGS__))
#include "bindings/cuda/depthwise_conv3x3.cpp"
#undef depthwise_launch

namespace py = pybind11;
using namespace dsnet::cuda;
namespace emulator = dsnet::emulator;

PYBIND11_MODULE(emulator_depthwise_conv3x3, m) {
  emulator::bind_operation(m);
  m.def("launches", [](const std::array<int64_t, 4>& extents, Storage storage, uintptr_t address) {
    const auto [batch, channels, height, width] = extents;
    auto* const data = emulator::at<void>(address);
    const Pixels pixels{data, height * width * channels, width * channels, channels};
    DepthwiseForward forward{};
    DepthwiseBackward backward{};
    forward.shape = backward.shape = {batch, channels, height, width};
    forward.x = backward.x = backward.grad = pixels;
    forward.out = backward.grad_x = data;
    py::list found;
    for (const DepthwiseLaunch& l :
        {depthwise_launch(forward, storage), depthwise_launch(backward, storage)}) {
      py::object launch = emulator::as_object(l);
      launch.attr("threads") = int{DepthwiseLaunch::threads};
      launch.attr("blocks") = l.blocks();
      found.append(launch);
    }
    return found;
  });
}
