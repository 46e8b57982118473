// Python module: the MLP's kernels and bindings for a GPU, in the emulator.
#include "cuda/pointwise_mlp.cu"
#include "cuda/pointwise_mlp_backward.cu"
#include "cuda/pointwise_mlp_backward_fused.cu"
#include "cuda/pointwise_mlp_fused.cu"
#include "cuda/sum_slots.cu"

#include "operation.h"

namespace dsnet::cuda {

template <typename Visit>
void visit_fields(MlpLaunch& l, const Visit& visit) {
  visit("packed", l.packed);
  visit("fused", l.fused);
  visit("large_hidden", l.large_hidden);
  visit("large_out", l.large_out);
  visit("slab_tokens", l.slab_tokens);
  visit("slabs", l.slabs);
  visit("hidden_slots", l.hidden_slots);
  visit("tokens_of_slot", l.tokens_of_slot);
  visit("channel_slots", l.channel_slots);
}

}  // namespace dsnet::cuda

#define mlp_launch(...) with_replaced_fields(mlp_launch(__VA_ARGS__))
#include "bindings/cuda/pointwise_mlp.cpp"
#undef mlp_launch

namespace py = pybind11;
using namespace dsnet::cuda;
namespace emulator = dsnet::emulator;

PYBIND11_MODULE(emulator_pointwise_mlp, m) {
  emulator::bind_operation(m);
  m.def("launches",
      [](const std::array<int64_t, 5>& e, Storage storage, uintptr_t address, uintptr_t hidden) {
        auto* const data = emulator::at<void>(address);
        MlpForward forward{};
        MlpBackward backward{};
        forward.shape = backward.shape = MlpShape{e[0], e[1], e[2], e[3], e[4]};
        forward.x = forward.fc1_weight = forward.fc2_weight = forward.out = data;
        forward.hidden = emulator::at<void>(hidden);
        backward.grad = backward.x = backward.fc1_weight = backward.fc2_transposed = data;
        backward.grad_x = data;
        backward.hidden = forward.hidden;
        py::list found;
        for (const MlpLaunch& l : {mlp_launch(forward, storage), mlp_launch(backward, storage)}) {
          py::object launch = emulator::as_object(l);
          launch.attr("fused_tokens") = int{MlpLaunch::fused_tokens};
          launch.attr("fused_hidden") = MlpLaunch::fused_hidden(forward.shape.channels);
          launch.attr("channel_rows") = int{MlpLaunch::channel_rows};
          launch.attr("large_rows") = int{MlpLaunch::large_rows};
          launch.attr("slab") = py::cpp_function([l, shape = forward.shape](int64_t i) {
            const MlpSlab slab = l.slab(shape, i);
            return std::pair{slab.first, slab.tokens};
          });
          found.append(launch);
        }
        return found;
      });
  m.def("gelu", [](float u) {
    const GeluFacts facts = gelu_facts<__half>(u);
    return py::make_tuple(gelu<__half>(u), facts.value, facts.slope);
  });
}
