// Python module: the depthwise convolution's CUDA launchers in the emulator.
#include "cuda/depthwise_conv3x3.cu"
#include "cuda/sum_slots.cu"

#include "arguments.h"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;
using emulator::at;

PYBIND11_MODULE(emulator_depthwise_conv3x3, m) {
  emulator::bind_arguments(m);

  py::class_<Pixels>(m, "Pixels", py::module_local())
      .def(py::init([](uintptr_t data, int64_t batch, int64_t row, int64_t column) {
        return Pixels{at<void>(data), batch, row, column};
      }));
  py::class_<DepthwiseShape>(m, "Shape", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, int64_t>());

  py::class_<DepthwiseForward>(m, "Forward", py::module_local())
      .def(py::init([](DepthwiseShape shape, Pixels x, Parameter weight, Parameter bias,
                        Parameter scale, Parameter shift, bool residual, uintptr_t out) {
        return DepthwiseForward{shape, x, weight, bias, scale, shift, residual, at<void>(out)};
      }));
  py::class_<DepthwiseBackward> backward(m, "Backward", py::module_local());
  backward.def(
      py::init([](DepthwiseShape shape, Pixels grad, Pixels x, Parameter weight, Parameter scale,
                   Parameter shift, bool residual, uintptr_t grad_x, uintptr_t rows) {
        return DepthwiseBackward{shape, grad, x, weight, scale, shift, residual, at<void>(grad_x),
            nullptr, at<float>(rows)};
      }));
  emulator::bind_address<&DepthwiseBackward::partials>(backward, "partials");

  py::class_<DepthwiseLaunch>(m, "Launch", py::module_local())
      .def_readonly_static("threads", &DepthwiseLaunch::threads)
      .def_readonly("pack", &DepthwiseLaunch::pack)
      .def_readonly("threads_x", &DepthwiseLaunch::threads_x)
      .def_readonly("threads_y", &DepthwiseLaunch::threads_y)
      .def_readonly("groups", &DepthwiseLaunch::groups)
      .def_readwrite("strips", &DepthwiseLaunch::strips)
      .def_readwrite("rows", &DepthwiseLaunch::rows)
      .def_readwrite("column_blocks", &DepthwiseLaunch::column_blocks)
      .def_readonly("repeats", &DepthwiseLaunch::repeats)
      .def("slots", &DepthwiseLaunch::slots)
      .def("blocks", &DepthwiseLaunch::blocks)
      .def("__str__", [](const DepthwiseLaunch& l) { return text(l); });

  m.def("launch", py::overload_cast<const DepthwiseForward&, Storage>(&depthwise_launch));
  m.def("launch", py::overload_cast<const DepthwiseBackward&, Storage>(&depthwise_launch));
  emulator::bind_launcher(m, "forward", depthwise_forward);
  emulator::bind_launcher(m, "backward", depthwise_backward);
}
