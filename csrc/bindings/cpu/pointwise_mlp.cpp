// The block's MLP on the CPU: checks, allocation, threads, registration.
#include "cpu/pointwise_mlp.h"

#include <tuple>
#include <vector>

#include "bindings/cpu/workspace.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

// Distance of neighbouring tokens of (B, C, H, W), if all have one and channels are adjacent.
std::optional<int64_t> token_stride(const Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return std::nullopt;
  int64_t tokens = 1, stride = x.size(1);
  bool found = false;
  for (int64_t dim : {3, 2, 0}) {
    if (x.size(dim) == 1) continue;
    if (!found) stride = x.stride(dim);
    if (found && x.stride(dim) != tokens * stride) return std::nullopt;
    found = true;
    tokens *= x.size(dim);
  }
  return stride;
}

// What both directions hold for their kernels.
template <typename Acc>
class Call : public Workspace {
 public:
  const cpu::MlpShape shape;
  const cpu::MlpLayout layout;

  Call(const Tensor& x, const MlpParameters& parameters)
      : Workspace("x", x),
        shape(check_pointwise_mlp<cpu::MlpShape>(x, parameters)),
        layout(shape),
        has_affine_(parameters.scale.has_value() || parameters.shift.has_value()) {
    const auto& p = parameters;
    fc1_bias_ = values_of<Acc>("fc1_bias", p.fc1_bias, shape.hidden, 0);
    fc2_bias_ = values_of<Acc>("fc2_bias", p.fc2_bias, shape.channels, 0);
    scale_ = values_of<Acc>("scale", p.scale, shape.channels, 1);
    shift_ = values_of<Acc>("shift", p.shift, shape.channels, 0);
    if (p.branch_scale.has_value()) factors_ = as_contiguous(*p.branch_scale);
    fc1_ = as_contiguous(p.fc1_weight);
    fc2_ = as_contiguous(p.fc2_weight);
  }

  template <typename Arguments>
  void describe(Arguments& args) const {
    args.shape = shape;
    args.scale = has_affine_ ? scale_.data() : nullptr;
    args.shift = has_affine_ ? shift_.data() : nullptr;
    args.fc1_bias = fc1_bias_.data();
    args.factors = factors_.has_value() ? view_of("branch_scale", *factors_) : cpu::Parameter{};
  }
  const void* fc2_bias() const { return fc2_bias_.data(); }

  cpu::Tokens tokens_of(const Tensor& x) {
    std::optional<int64_t> stride = token_stride(x);
    if (stride.has_value()) return {x.const_data_ptr(), *stride};
    copies_.push_back(torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast));
    if (!token_stride(copies_.back()).has_value()) {
      copies_.back() = torch::stable::clone(copies_.back());
    }
    return {copies_.back().const_data_ptr(), shape.channels};
  }

  enum Which { first, second };
  // A weight as an operand: as it lies, if products can read that, or staged.
  template <typename Stage>
  cpu::MlpWeight operand(Which which, bool transposed, bool pairs, const Stage& stage) {
    const Tensor& source = which == first ? fc1_ : fc2_;
    const int64_t R = shape.hidden, C = shape.channels;
    cpu::MlpWeight weight{};
    weight.weight = view_of(which == first ? "fc1_weight" : "fc2_weight", source);
    weight.rows = which == first ? R : C;
    weight.columns = which == first ? C : R;
    weight.transposed = transposed;
    const bool in_words = reinterpret_cast<uintptr_t>(weight.weight.data) % 4 == 0;
    const bool readable = pairs
                              ? !weight.weight.is_accumulator && weight.columns % 2 == 0 && in_words
                              : weight.weight.is_accumulator;
    const int64_t words = pairs ? (weight.depth() + 1) / 2 : weight.depth();
    weight.stride = words;
    if (transposed || !readable) {
      weight.memory = held({weight.operand_rows(), words});
      const int64_t block = cpu::MlpLayout::stage_rows;
      // Moving a value costs about as much as four products.
      run(stage, weight, block * (weight.depth() + 2 * cpu::lanes),
          (weight.operand_rows() + block - 1) / block, 4 * block * weight.depth());
    }
    return weight;
  }

 private:
  bool has_affine_;
  std::vector<Acc> fc1_bias_, fc2_bias_, scale_, shift_;
  Tensor fc1_, fc2_;
  OptionalTensor factors_;
  std::vector<Tensor> copies_;
};

int64_t kept_size(const cpu::MlpShape& shape) {
  return (shape.tokens() + cpu::lanes - 1) / cpu::lanes * cpu::lanes * shape.hidden;
}

}  // namespace

std::tuple<Tensor, Tensor> pointwise_mlp(const Tensor& x, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& branch_scale,
    bool keep_hidden) {
  Tensor out = empty_channels_last(x), hidden;
  with_accumulator(storage_of(x), [&](auto zero) {
    Call<decltype(zero)> call(
        x, {fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale});
    const cpu::MlpShape& shape = call.shape;
    hidden = torch::stable::empty(
        {keep_hidden ? kept_size(shape) : 0}, x.scalar_type(), std::nullopt, x.device());
    if (shape.tokens() == 0) return;
    const auto kernels = cpu::pointwise_mlp_forward(cpu::capability(), call.storage);
    cpu::MlpForward args{};
    call.describe(args);
    args.x = call.tokens_of(x);
    args.fc1 = call.operand(call.first, false, kernels.pairs, kernels.stage);
    args.fc2 = call.operand(call.second, false, kernels.pairs, kernels.stage);
    args.fc2_bias = call.fc2_bias();
    args.hidden = keep_hidden ? hidden.mutable_data_ptr() : nullptr;
    args.out = out.mutable_data_ptr();
    const cpu::MlpLayout& layout = call.layout;
    const int64_t C = shape.channels, R = shape.hidden, columns = layout.vectors * cpu::lanes;
    const int64_t size = layout.forward_scratch();
    if (!layout.is_shared()) {
      call.run(kernels.run, args, size, layout.vectors, 2 * cpu::lanes * C * R);
      return;
    }
    args.panels = call.held({layout.channels, columns});
    args.activations = call.held({layout.hidden, columns});
    args.sums = call.held({C, columns});
    constexpr int64_t unit = cpu::MlpLayout::shared_rows;
    // Moving a value costs about as much as four products.
    call.run(kernels.put, args, size, layout.vectors, 4 * cpu::lanes * C);
    call.run(kernels.first, args, 0, (R + unit - 1) / unit, unit * columns * C);
    call.run(kernels.second, args, 0, (C + unit - 1) / unit, unit * columns * R);
    call.run(kernels.take, args, size, layout.vectors, 4 * cpu::lanes * C);
  });
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_mlp_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& hidden, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& branch_scale) {
  check_gradient(grad, x);
  Tensor grad_x = empty_channels_last(x);
  std::vector<Tensor> grads;
  with_accumulator(storage_of(x), [&](auto zero) {
    Call<decltype(zero)> call(
        x, {fc1_weight, fc1_bias, fc2_weight, std::nullopt, scale, shift, branch_scale});
    const cpu::MlpShape& shape = call.shape;
    const cpu::MlpLayout& layout = call.layout;
    const int64_t C = shape.channels, R = shape.hidden;
    if (hidden.has_value()) {
      check_shape("hidden", hidden, {kept_size(shape)});
      check_same_dtype("hidden", *hidden, "x", x);
    }
    grads = {call.memory({R, C}), call.memory({R}), call.memory({C, R}), call.memory({C}),
        call.memory({C}), call.memory({C})};
    if (shape.tokens() == 0) {
      for (Tensor& each : grads) torch::stable::zero_(each);
      return;
    }
    const auto kernels = cpu::pointwise_mlp_backward(cpu::capability(), call.storage);
    cpu::MlpBackward args{};
    call.describe(args);
    args.grad = call.tokens_of(grad);
    args.x = call.tokens_of(x);
    args.hidden = hidden.has_value() ? hidden->const_data_ptr() : nullptr;
    if (!hidden.has_value()) {
      args.fc1 = call.operand(call.first, false, kernels.pairs, kernels.stage);
    }
    args.fc1_transposed = call.operand(call.first, true, kernels.pairs, kernels.stage);
    args.fc2_transposed = call.operand(call.second, true, kernels.pairs, kernels.stage);
    args.activations = call.held({R, layout.chunk_tokens()});
    args.grad_hidden = call.held({R, layout.chunk_tokens()});
    args.inputs = call.held({layout.chunk_tokens(), layout.channels});
    args.grads = call.held({layout.chunk_tokens(), layout.channels});
    args.column_sums = call.held({layout.vectors, cpu::MlpLayout::column_sums, layout.channels});
    args.fc1_sums = call.held({R, layout.channels});
    args.fc2_sums = call.held({R, layout.channels});
    constexpr int64_t accumulators_of_double = 2;
    args.bias_sums = static_cast<double*>(call.held({accumulators_of_double, R}));
    args.grad_x = grad_x.mutable_data_ptr();
    void** const out[] = {&args.grad_fc1_weight, &args.grad_fc1_bias, &args.grad_fc2_weight,
        &args.grad_fc2_bias, &args.grad_scale, &args.grad_shift};
    for (size_t i = 0; i < grads.size(); ++i) *out[i] = grads[i].mutable_data_ptr();

    const int64_t size = layout.backward_scratch(), unit = cpu::MlpLayout::row_unit;
    for (args.first = 0; args.first < layout.vectors; args.first += layout.chunk) {
      args.vectors = std::min(layout.chunk, layout.vectors - args.first);
      call.run(kernels.tokens, args, size, args.vectors, 2 * cpu::lanes * C * R);
      call.run(kernels.weights, args, 0, (R + unit - 1) / unit,
          2 * unit * args.vectors * cpu::lanes * C);
    }
    call.run(kernels.finish, args, 0, layout.channels / cpu::lanes, 4 * cpu::lanes * R);
  });
  return {grad_x, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("pointwise_mlp", TORCH_BOX(&dsnet::pointwise_mlp));
  m.impl("pointwise_mlp_backward", TORCH_BOX(&dsnet::pointwise_mlp_backward));
}
