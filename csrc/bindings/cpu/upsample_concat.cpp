// Upsampling, concatenation and mixing on the CPU: checks, allocation, threads, registration.
#include "cpu/upsample_concat.h"

#include <tuple>

#include "bindings/cpu/forward_steps.h"
#include "bindings/cpu/packed_weight.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

// What both directions hold for their kernels.
class Call : public Workspace {
 public:
  const cpu::UpsampleShape shape;
  const cpu::UpsampleLayout layout;

  Call(const Tensor& local, const Tensor& global, const Tensor& weight,
      const OptionalTensor& factors)
      : Workspace("local", local),
        shape(check_upsample_concat<cpu::UpsampleShape>(local, global, weight, factors)),
        layout(shape),
        local_(with_adjacent_channels(local)),
        global_(with_adjacent_channels(global)),
        weight_(as_contiguous(weight)),
        factors_(contiguous_of(factors)),
        rows_(shape.global_height, shape.height),
        columns_(shape.global_width, shape.width) {}

  template <typename Arguments>
  void describe(Arguments& args) {
    args.shape = shape;
    args.local = pixels_of<cpu::Pixels>(local_);
    args.global = pixels_of<cpu::Pixels>(global_);
    args.weight = view_of("weight", weight_);
    args.factors = optional_view_of(*this, "branch_scale", factors_);
    args.rows = rows_.taps();
    args.columns = columns_.taps();
  }

  Tensor empty_output(int64_t channels, int64_t height, int64_t width) const {
    return torch::stable::empty({shape.batch, channels, height, width}, local_.scalar_type(),
        std::nullopt, local_.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  }

 private:
  Tensor local_, global_, weight_;
  OptionalTensor factors_;
  cpu::Axis rows_, columns_;
};

}  // namespace

Tensor upsample_concat(const Tensor& local, const Tensor& global, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& factors) {
  Call call(local, global, weight, factors);
  const cpu::UpsampleShape& shape = call.shape;
  const cpu::UpsampleLayout& layout = call.layout;
  check_shape("bias", bias, {shape.channels});
  check_shape("residual", residual, {shape.batch, shape.channels, shape.height, shape.width});
  if (residual.has_value()) check_same_dtype("residual", *residual, "local", local);
  Tensor out = call.empty_output(shape.channels, shape.height, shape.width);
  if (shape.batch == 0) return out;

  const OptionalTensor bias_source = contiguous_of(bias);
  OptionalTensor residual_source;
  cpu::UpsampleForward args{};
  call.describe(args);
  args.bias = optional_view_of(call, "bias", bias_source);
  if (residual.has_value()) {
    residual_source = with_adjacent_channels(*residual);
    args.residual = pixels_of<cpu::Pixels>(*residual_source);
  }
  args.bias_row = call.held({layout.channels});
  args.packed_local = call.held({shape.local_channels, layout.channels});
  args.packed_global = call.held({shape.global_channels, layout.channels});
  args.out = out.mutable_data_ptr();

  const auto kernels = cpu::upsample_concat_forward(cpu::capability(), call.storage);
  // Moving a value costs about as much as four products.
  call.run(kernels.pack, args, layout.scratch(shape), layout.packs,
      4 * cpu::lanes * shape.weight_columns());
  run_upsample_concat(call, kernels, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_concat_backward(const Tensor& grad,
    const Tensor& local, const Tensor& global, const Tensor& weight,
    const OptionalTensor& factors) {
  Call call(local, global, weight, factors);
  const cpu::UpsampleShape& shape = call.shape;
  const cpu::UpsampleLayout& layout = call.layout;
  const int64_t C = shape.channels, Cl = shape.local_channels, Cg = shape.global_channels;
  check_shape("grad", grad, {shape.batch, C, shape.height, shape.width});
  check_same_dtype("grad", grad, "local", local);
  Tensor grad_local = call.empty_output(Cl, shape.height, shape.width);
  Tensor grad_global = call.empty_output(Cg, shape.global_height, shape.global_width);
  Tensor grad_weight = call.memory({C, Cl + Cg}), grad_bias = call.memory({C});
  if (shape.batch == 0) {
    for (Tensor* each : {&grad_local, &grad_global, &grad_weight, &grad_bias}) {
      torch::stable::zero_(*each);
    }
    return {grad_local, grad_global, grad_weight, grad_bias};
  }

  const Tensor grad_source = with_adjacent_channels(grad);
  const cpu::UpsampleBackwardLayout cut(shape);
  cpu::UpsampleBackward args{};
  call.describe(args);
  args.cut = cut;
  args.grad = pixels_of<cpu::Pixels>(grad_source);
  args.packed_local = call.held({C, layout.local});
  args.packed_global = call.held({C, layout.global});
  args.weight_sums = call.held({cut.slots, C, layout.local});
  constexpr int64_t accumulators_of_double = 2;
  args.bias_sums =
      static_cast<double*>(call.held({accumulators_of_double, cut.slots, layout.channels}));
  args.coarse_sums = call.held({cut.sum_rows(shape), shape.global_width, layout.channels});
  args.grad_mixed = call.held({shape.global_tokens(), layout.channels});
  args.global_values = call.held({shape.global_tokens(), layout.global});
  args.grad_local = grad_local.mutable_data_ptr();
  args.grad_global = grad_global.mutable_data_ptr();
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_bias = grad_bias.mutable_data_ptr();

  const auto kernels = cpu::upsample_concat_backward(cpu::capability(), call.storage);
  const int64_t size = cut.scratch(shape, layout);
  // Moving a value costs about as much as four products.
  call.run(
      kernels.pack, args, size, (layout.local + layout.global) / cpu::lanes, 4 * C * cpu::lanes);
  call.run(kernels.local_stream, args, size, cut.slots, cut.slot_rows * shape.width * 2 * C * Cl);
  call.run(kernels.global_stream, args, size, cut.global_blocks,
      cut.global_block_rows * shape.global_width * C * Cg);
  call.run(kernels.weights, args, size, cut.weight_blocks,
      cpu::UpsampleBackwardLayout::weight_block * (shape.global_tokens() * Cg + cut.slots * Cl));
  return {grad_local, grad_global, grad_weight, grad_bias};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("upsample_concat", TORCH_BOX(&dsnet::upsample_concat));
  m.impl("upsample_concat_backward", TORCH_BOX(&dsnet::upsample_concat_backward));
}
