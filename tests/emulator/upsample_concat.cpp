// Python module: the CUDA launchers of upsampling and concatenation in the emulator.
#include "cuda/upsample_concat.cu"
#include "cuda/sum_slots.cu"
#include "cuda/upsample_concat_backward.cu"

#include "arguments.h"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;
using emulator::at;

PYBIND11_MODULE(emulator_upsample_concat, m) {
  emulator::bind_arguments(m);

  py::class_<UpsampleShape>(m, "Shape", py::module_local())
      .def(py::init([](int64_t batch, int64_t height, int64_t width, int64_t global_height,
                        int64_t global_width, int64_t local_channels, int64_t global_channels,
                        int64_t channels) {
        return UpsampleShape{batch, height, width, global_height, global_width, local_channels,
            global_channels, channels};
      }));
  py::class_<UpsampleForward>(m, "Forward", py::module_local())
      .def(py::init([](UpsampleShape shape, uintptr_t local, uintptr_t global, uintptr_t weight,
                        Parameter bias, uintptr_t residual, Parameter branch_scale, uintptr_t mixed,
                        uintptr_t out) {
        return UpsampleForward{shape, at<void>(local), at<void>(global), at<void>(weight), bias,
            at<void>(residual), branch_scale, at<float>(mixed), at<void>(out)};
      }));
  py::class_<UpsampleBackward> backward(m, "Backward", py::module_local());
  backward.def(py::init(
      [](UpsampleShape shape, uintptr_t grad, uintptr_t local, uintptr_t global, uintptr_t weight,
          Parameter branch_scale, uintptr_t grad_mixed, uintptr_t grad_local, uintptr_t grad_global,
          uintptr_t grad_weight, uintptr_t grad_bias) {
        return UpsampleBackward{shape, at<void>(grad), at<void>(local), at<void>(global),
            at<void>(weight), branch_scale, at<float>(grad_mixed), at<void>(grad_local),
            at<void>(grad_global), nullptr, at<float>(grad_weight), at<float>(grad_bias)};
      }));
  emulator::bind_address<&UpsampleBackward::partials>(backward, "partials");

  py::class_<UpsampleLaunch>(m, "Launch", py::module_local())
      .def_readonly_static("block_rows", &UpsampleLaunch::block_rows)
      .def_readonly_static("block_columns", &UpsampleLaunch::block_columns)
      .def_readonly_static("gather_packs", &UpsampleLaunch::gather_packs)
      .def_readonly_static("gather_rows", &UpsampleLaunch::gather_rows)
      .def_readonly("packed", &UpsampleLaunch::packed)
      .def_readonly("pixel_blocks", &UpsampleLaunch::pixel_blocks)
      .def_readonly("cell_blocks", &UpsampleLaunch::cell_blocks)
      .def_readonly("mixed_blocks", &UpsampleLaunch::mixed_blocks)
      .def_readonly("local_blocks", &UpsampleLaunch::local_blocks)
      .def_readonly("global_blocks", &UpsampleLaunch::global_blocks)
      .def_readonly("pack", &UpsampleLaunch::pack)
      .def_readonly("lanes", &UpsampleLaunch::lanes)
      .def_readonly("gather_blocks", &UpsampleLaunch::gather_blocks)
      .def_readonly("gather_groups", &UpsampleLaunch::gather_groups)
      .def_readwrite("slots", &UpsampleLaunch::slots)
      .def_readwrite("pixels_of_slot", &UpsampleLaunch::pixels_of_slot)
      .def_readwrite("cells_of_slot", &UpsampleLaunch::cells_of_slot)
      .def("__str__", [](const UpsampleLaunch& l) { return text(l); });

  m.def("launch", py::overload_cast<const UpsampleForward&, Storage>(&upsample_launch));
  m.def("launch", py::overload_cast<const UpsampleBackward&, Storage>(&upsample_launch));
  emulator::bind_launcher(m, "forward", upsample_forward);
  emulator::bind_launcher(m, "backward", upsample_backward);
}
