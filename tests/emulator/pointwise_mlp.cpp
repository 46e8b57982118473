// Python module: the CUDA launchers of the MLP in the emulator.
#include "cuda/pointwise_mlp.cu"
#include "cuda/pointwise_mlp_backward.cu"
#include "cuda/pointwise_mlp_backward_fused.cu"
#include "cuda/pointwise_mlp_fused.cu"
#include "cuda/sum_slots.cu"

#include "arguments.h"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;
using emulator::at;

PYBIND11_MODULE(emulator_pointwise_mlp, m) {
  emulator::bind_arguments(m);

  py::class_<MlpShape>(m, "Shape", py::module_local())
      .def(py::init(
          [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden) {
            return MlpShape{batch, height, width, channels, hidden};
          }));
  py::class_<MlpSlab>(m, "Slab", py::module_local())
      .def_readonly("first", &MlpSlab::first)
      .def_readonly("tokens", &MlpSlab::tokens);
  py::class_<MlpForward> forward(m, "Forward", py::module_local());
  forward.def(py::init([](MlpShape shape, uintptr_t x, uintptr_t fc1_weight, Parameter fc1_bias,
                           uintptr_t fc2_weight, Parameter fc2_bias, Parameter scale,
                           Parameter shift, Parameter branch_scale, uintptr_t hidden,
                           uintptr_t out) {
    return MlpForward{shape, at<void>(x), at<void>(fc1_weight), fc1_bias, at<void>(fc2_weight),
        fc2_bias, scale, shift, branch_scale, nullptr, nullptr, at<void>(hidden), at<void>(out)};
  }));
  emulator::bind_address<&MlpForward::normalized>(forward, "normalized");
  emulator::bind_address<&MlpForward::activated>(forward, "activated");
  py::class_<MlpBackward> backward(m, "Backward", py::module_local());
  backward.def(py::init(
      [](MlpShape shape, uintptr_t grad, uintptr_t x, uintptr_t hidden, uintptr_t fc1_weight,
          Parameter fc1_bias, uintptr_t fc2_transposed, Parameter scale, Parameter shift,
          Parameter branch_scale, uintptr_t grad_x, uintptr_t grad_fc1_bias,
          uintptr_t grad_fc2_bias, uintptr_t grad_scale, uintptr_t grad_shift) {
        MlpBackward args{};
        args.shape = shape;
        args.grad = at<void>(grad);
        args.x = at<void>(x);
        args.hidden = at<void>(hidden);
        args.fc1_weight = at<void>(fc1_weight);
        args.fc1_bias = fc1_bias;
        args.fc2_transposed = at<void>(fc2_transposed);
        args.scale = scale;
        args.shift = shift;
        args.branch_scale = branch_scale;
        args.grad_x = at<void>(grad_x);
        args.grad_fc1_bias = at<float>(grad_fc1_bias);
        args.grad_fc2_bias = at<float>(grad_fc2_bias);
        args.grad_scale = at<float>(grad_scale);
        args.grad_shift = at<float>(grad_shift);
        return args;
      }));
  emulator::bind_address<&MlpBackward::normalized>(backward, "normalized");
  emulator::bind_address<&MlpBackward::grad_branch>(backward, "grad_branch");
  emulator::bind_address<&MlpBackward::activated>(backward, "activated");
  emulator::bind_address<&MlpBackward::grad_hidden>(backward, "grad_hidden");
  emulator::bind_address<&MlpBackward::grad_normalized>(backward, "grad_normalized");
  emulator::bind_address<&MlpBackward::fc1_partials>(backward, "fc1_partials");
  emulator::bind_address<&MlpBackward::fc2_partials>(backward, "fc2_partials");
  emulator::bind_address<&MlpBackward::grad_fc1>(backward, "grad_fc1");
  emulator::bind_address<&MlpBackward::grad_fc2>(backward, "grad_fc2");
  emulator::bind_address<&MlpBackward::hidden_partials>(backward, "hidden_partials");
  emulator::bind_address<&MlpBackward::channel_partials>(backward, "channel_partials");

  py::class_<MlpLaunch>(m, "Launch", py::module_local())
      .def_readonly_static("fused_tokens", &MlpLaunch::fused_tokens)
      .def_readonly_static("channel_rows", &MlpLaunch::channel_rows)
      .def_readonly_static("large_rows", &MlpLaunch::large_rows)
      .def_readonly("packed", &MlpLaunch::packed)
      .def_readwrite("fused", &MlpLaunch::fused)
      .def_readwrite("large_hidden", &MlpLaunch::large_hidden)
      .def_readwrite("large_out", &MlpLaunch::large_out)
      .def_readwrite("slab_tokens", &MlpLaunch::slab_tokens)
      .def_readwrite("slabs", &MlpLaunch::slabs)
      .def_readwrite("hidden_slots", &MlpLaunch::hidden_slots)
      .def_readonly("channel_slots", &MlpLaunch::channel_slots)
      .def_readwrite("tokens_of_slot", &MlpLaunch::tokens_of_slot)
      .def_static("fused_hidden", &MlpLaunch::fused_hidden)
      .def("slab", &MlpLaunch::slab)
      .def("__str__", [](const MlpLaunch& l) { return text(l); });

  m.def("launch", py::overload_cast<const MlpForward&, Storage>(&mlp_launch));
  m.def("launch", py::overload_cast<const MlpBackward&, Storage>(&mlp_launch));
  emulator::bind_launcher(m, "forward", mlp_forward);
  emulator::bind_launcher(m, "backward_fused", mlp_backward_fused);
  m.def("backward_hidden",
      [](const MlpBackward& args, Storage storage, const MlpLaunch& launch, MlpSlab slab) {
        mlp_backward_hidden(args, storage, launch, slab, nullptr);
      });
  m.def("backward_tokens",
      [](const MlpBackward& args, Storage storage, const MlpLaunch& launch, MlpSlab slab) {
        mlp_backward_tokens(args, storage, launch, slab, nullptr);
      });
  m.def("backward_sums", [](const MlpBackward& args, const MlpLaunch& launch) {
    mlp_backward_sums(args, launch, nullptr);
  });
  m.def("gelu", [](float u) {
    const GeluFacts facts = gelu_facts<__half>(u);
    return py::make_tuple(gelu<__half>(u), facts.value, facts.slope);
  });
}
