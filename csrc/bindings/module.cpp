// dsnet_kernels._C: what is not a tensor operation, for people and tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "build_record.h"
#include "cpu/capability.h"
#include "cuda/depthwise_conv3x3.h"

namespace py = pybind11;
namespace cpu = dsnet::cpu;

namespace {

std::string depthwise_launch(
    const std::array<int64_t, 4>& extents, const std::string& dtype, bool backward) {
  using namespace dsnet::cuda;
  const auto [batch, channels, height, width] = extents;
  const DepthwiseShape shape{batch, channels, height, width};
  Storage storage;
  if (dtype == "float32") {
    storage = Storage::float32;
  } else if (dtype == "bfloat16") {
    storage = Storage::bfloat16;
  } else if (dtype == "float16") {
    storage = Storage::float16;
  } else {
    throw py::value_error("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
  }
  const Pixels pixels{nullptr, height * width * channels, width * channels, channels};
  if (backward) {
    DepthwiseBackward args{};
    args.shape = shape;
    args.grad = args.x = pixels;
    return text(dsnet::cuda::depthwise_launch(args, storage));
  }
  DepthwiseForward args{};
  args.shape = shape;
  args.x = pixels;
  return text(dsnet::cuda::depthwise_launch(args, storage));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the native libraries.";

  m.def(
      "cpu_capability", [] { return cpu::name(cpu::capability()); },
      "The instruction set in use: 'generic', 'avx2' or 'avx512'.");
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"),
      "Replaces the instruction set in use. ValueError if it is unknown or not on this CPU.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (cpu::Capability capability : cpu::capabilities())
          names.push_back(cpu::name(capability));
        return names;
      },
      "The instruction sets compiled in and on this CPU, ascending.");
  m.def("depthwise_conv3x3_launch", &depthwise_launch, py::arg("shape"), py::arg("dtype"),
      py::arg("backward") = false,
      "The GPU launch chosen for a contiguous channels_last (B, C, H, W) of 'float32', 'bfloat16' "
      "or "
      "'float16', as text.");
  m.def(
      "build_configuration", [] { return py::module_::import("json").attr("loads")(build_record); },
      "What this module was built with: the record that is also in build.json.");
}
