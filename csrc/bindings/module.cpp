// dsnet_kernels._C: what is not a tensor operation, for people and tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cpu/capability.h"
#include "cpu/step_clock.h"
#include "cuda/co_attention.h"
#include "cuda/depthwise_conv3x3.h"
#include "cuda/global_attention.h"
#include "cuda/pointwise_mlp.h"

namespace py = pybind11;
namespace cpu = dsnet::cpu;

namespace {

dsnet::cuda::Storage storage_of(const std::string& dtype) {
  if (dtype == "float32") return dsnet::cuda::Storage::float32;
  if (dtype == "bfloat16") return dsnet::cuda::Storage::bfloat16;
  if (dtype == "float16") return dsnet::cuda::Storage::float16;
  throw py::value_error("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

std::string depthwise_launch(
    const std::array<int64_t, 4>& extents, const std::string& dtype, bool backward) {
  using namespace dsnet::cuda;
  const auto [batch, channels, height, width] = extents;
  const DepthwiseShape shape{batch, channels, height, width};
  const Storage storage = storage_of(dtype);
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

std::string attention_launch(const std::array<int64_t, 3>& extents, int64_t num_heads) {
  const auto [batch, tokens, width] = extents;
  if (num_heads <= 0 || width % num_heads != 0) {
    throw py::value_error("num_heads: expected a divisor of " + std::to_string(width) + ", got " +
                          std::to_string(num_heads));
  }
  dsnet::cuda::AttentionForward args{};
  args.shape = {batch, tokens, num_heads, width / num_heads};
  return text(dsnet::cuda::attention_launch(args));
}

std::string co_attention_launch(
    const std::array<int64_t, 5>& extents, int64_t num_heads, int64_t head_dim, int form) {
  const auto [batch, local_tokens, global_tokens, local_width, global_width] = extents;
  dsnet::cuda::CoAttentionForward args{};
  args.shape = {batch, local_tokens, global_tokens, local_width, global_width, num_heads, head_dim};
  return text(dsnet::cuda::co_attention_launch(args, form));
}

std::string mlp_launch(const std::array<int64_t, 4>& extents, int64_t hidden,
    const std::string& dtype, bool keep_hidden, bool backward) {
  using namespace dsnet::cuda;
  const auto [batch, channels, height, width] = extents;
  const MlpShape shape{batch, height, width, channels, hidden};
  const Storage storage = storage_of(dtype);
  // An address that is not read: there are hidden activations.
  alignas(16) static char kept;
  if (backward) {
    MlpBackward args{};
    args.shape = shape;
    args.hidden = keep_hidden ? &kept : nullptr;
    return text(dsnet::cuda::mlp_launch(args, storage));
  }
  MlpForward args{};
  args.shape = shape;
  args.hidden = keep_hidden ? &kept : nullptr;
  return text(dsnet::cuda::mlp_launch(args, storage));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the native libraries.";

  m.def(
      "cpu_capability", [] { return cpu::name(cpu::capability()); },
      "The instruction set in use: 'generic', 'avx2', 'avx512' or 'avx512_bf16'.");
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
  m.def("watch_block_steps", &cpu::watch_steps, py::arg("on"),
      "Starts timing the steps of ds_block on the CPU from zero, or stops.");
  m.def(
      "block_step_seconds",
      [] {
        std::vector<std::pair<std::string, double>> steps;
        const std::vector<std::string> names = cpu::step_names();
        const std::vector<double> seconds = cpu::step_seconds();
        for (size_t i = 0; i < names.size(); ++i) steps.emplace_back(names[i], seconds[i]);
        return steps;
      },
      "(step, seconds) of all calls of ds_block since, in the order of the block.");
  m.def("co_attention_launch", &co_attention_launch, py::arg("shape"), py::arg("num_heads"),
      py::arg("head_dim"), py::arg("absorbed") = -1,
      "The GPU launch chosen for contiguous streams (B, N, M, Cl, Cg), as text; absorbed is 1, 0 "
      "or "
      "-1 for the form with fewer products.");
  m.def("depthwise_conv3x3_launch", &depthwise_launch, py::arg("shape"), py::arg("dtype"),
      py::arg("backward") = false,
      "The GPU launch chosen for a contiguous channels_last (B, C, H, W) of 'float32', 'bfloat16' "
      "or "
      "'float16', as text.");
  m.def("global_attention_launch", &attention_launch, py::arg("shape"), py::arg("num_heads"),
      "The GPU launch chosen for contiguous tokens (B, M, C), forward and backward, as text.");
  m.def("pointwise_mlp_launch", &mlp_launch, py::arg("shape"), py::arg("hidden"), py::arg("dtype"),
      py::arg("keep_hidden"), py::arg("backward") = false,
      "The GPU launch chosen for a contiguous channels_last (B, C, H, W) of a dtype and so many "
      "hidden channels, which the forward keeps or the backward recomputes, as text.");
}
