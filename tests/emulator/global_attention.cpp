// Python module: the global attention's CUDA launchers in the emulator.
#include "cuda/global_attention.cu"
#include "cuda/global_attention_backward.cu"
#include "cuda/sum_slots.cu"

#include "arguments.h"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;
using emulator::at;

PYBIND11_MODULE(emulator_global_attention, m) {
  emulator::bind_arguments(m);

  py::class_<AttentionShape>(m, "Shape", py::module_local())
      .def(py::init([](int64_t batch, int64_t tokens, int64_t width, int64_t heads) {
        return AttentionShape{batch, tokens, heads, width / heads};
      }));
  py::class_<AttentionInputs>(m, "Inputs", py::module_local())
      .def(
          py::init([](uintptr_t x, Parameter norm_weight, Parameter norm_bias, uintptr_t qkv_weight,
                       Parameter qkv_bias, double eps, double dropout_p, uintptr_t seed) {
            return AttentionInputs{at<void>(x), norm_weight, norm_bias, at<void>(qkv_weight),
                qkv_bias, static_cast<float>(eps), dropout_of(dropout_p, at<int64_t>(seed))};
          }));
  py::class_<AttentionForward>(m, "Forward", py::module_local())
      .def(py::init([](AttentionShape shape, AttentionInputs inputs, uintptr_t out, uintptr_t lse,
                        uintptr_t qkv) {
        return AttentionForward{shape, inputs, at<void>(out), at<float>(lse), at<void>(qkv)};
      }));
  py::class_<AttentionBackward> backward(m, "Backward", py::module_local());
  backward.def(
      py::init([](AttentionShape shape, AttentionInputs inputs, uintptr_t grad, uintptr_t lse,
                   uintptr_t qkv, uintptr_t normalized, uintptr_t statistics, uintptr_t row_sums,
                   uintptr_t grad_qkv, uintptr_t grad_x, uintptr_t grad_norm_weight,
                   uintptr_t grad_norm_bias, uintptr_t grad_qkv_bias) {
        return AttentionBackward{shape, inputs, at<void>(grad), at<float>(lse), at<void>(qkv),
            at<void>(normalized), at<float>(statistics), at<float>(row_sums), at<void>(grad_qkv),
            nullptr, at<void>(grad_x), nullptr, at<float>(grad_norm_weight),
            at<float>(grad_norm_bias), at<float>(grad_qkv_bias)};
      }));
  emulator::bind_address<&AttentionBackward::partials>(backward, "partials");
  emulator::bind_address<&AttentionBackward::grad_normalized>(backward, "grad_normalized");

  py::class_<AttentionLaunch>(m, "Launch", py::module_local())
      .def_readonly_static("block_rows", &AttentionLaunch::block_rows)
      .def_readonly_static("block_columns", &AttentionLaunch::block_columns)
      .def_readwrite("fused", &AttentionLaunch::fused)
      .def_readonly("packed", &AttentionLaunch::packed)
      .def_readonly("head_tile", &AttentionLaunch::head_tile)
      .def_readonly("fused_threads", &AttentionLaunch::fused_threads)
      .def_readonly("row_tiles", &AttentionLaunch::row_tiles)
      .def_readonly("token_blocks", &AttentionLaunch::token_blocks)
      .def_readonly("column_blocks", &AttentionLaunch::column_blocks)
      .def_readwrite("slots", &AttentionLaunch::slots)
      .def_readwrite("slot_rows", &AttentionLaunch::slot_rows)
      .def("attention_blocks", &AttentionLaunch::attention_blocks)
      .def("projection_blocks", &AttentionLaunch::projection_blocks)
      .def("__str__", [](const AttentionLaunch& l) { return text(l); });

  m.def("launch", py::overload_cast<const AttentionForward&>(&attention_launch));
  m.def("launch", py::overload_cast<const AttentionBackward&>(&attention_launch));
  emulator::bind_launcher(m, "forward", attention_forward);
  emulator::bind_launcher(m, "backward_scores", attention_backward_scores);
  emulator::bind_launcher(m, "backward_norm", attention_backward_norm);
}
