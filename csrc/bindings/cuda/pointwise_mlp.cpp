// The block's MLP on NVIDIA GPUs: checks, allocation, dense products of the backward, registration.
#include "cuda/pointwise_mlp.h"

#include "bindings/cuda/dense.h"

namespace dsnet {
namespace {

// Everything that both directions read, alive as long as this is.
class Inputs {
 public:
  Inputs(const Tensor& x, const MlpParameters& p)
      : x_(as_channels_last(x)),
        fc1_weight_(with_dtype_of(x, "fc1_weight", p.fc1_weight)),
        fc2_weight_(with_dtype_of(x, "fc2_weight", p.fc2_weight)),
        fc1_bias_("fc1_bias", p.fc1_bias, x),
        fc2_bias_("fc2_bias", p.fc2_bias, x),
        scale_("scale", p.scale, x),
        shift_("shift", p.shift, x),
        branch_scale_("branch_scale", p.branch_scale, x) {}

  const Tensor& x() const { return x_; }
  const Tensor& fc1_weight() const { return fc1_weight_; }
  const Tensor& fc2_weight() const { return fc2_weight_; }
  cuda::Parameter fc1_bias() const { return fc1_bias_.view(); }
  cuda::Parameter fc2_bias() const { return fc2_bias_.view(); }
  cuda::Parameter scale() const { return scale_.view(); }
  cuda::Parameter shift() const { return shift_.view(); }
  cuda::Parameter branch_scale() const { return branch_scale_.view(); }
  bool has_affine() const { return scale().data != nullptr || shift().data != nullptr; }

 private:
  Tensor x_, fc1_weight_, fc2_weight_;
  Values fc1_bias_, fc2_bias_, scale_, shift_, branch_scale_;
};

// R per token, tokens in whole sixteens: (B·H·W, R), the rest unwritten.
int64_t hidden_values(const cuda::MlpShape& shape) {
  return (shape.tokens + 15) / 16 * 16 * shape.hidden;
}

// (B, C, H, W) in channels_last as (B·H·W, C).
Tensor as_rows(const Tensor& x, const cuda::MlpShape& shape) {
  using torch::stable::transpose;
  return torch::stable::view(transpose(transpose(x, 1, 3), 1, 2), {shape.tokens, shape.channels});
}

Tensor rows_from(Tensor x, int64_t first, int64_t rows) {
  return torch::stable::narrow(x, 0, first, rows);
}

}  // namespace

std::tuple<Tensor, Tensor> pointwise_mlp(const Tensor& x, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& branch_scale,
    bool keep_hidden) {
  const MlpParameters parameters{
      fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale};
  const auto shape = check_pointwise_mlp<cuda::MlpShape>(x, parameters);
  const cuda::Storage storage = storage_of(x);
  const Launch on(x);
  const auto values = [&](int64_t rows, int64_t columns) {
    return empty_beside(x, {rows, columns}, x.scalar_type());
  };
  Tensor out = empty_channels_last(x);
  Tensor hidden = empty_beside(x, {keep_hidden ? hidden_values(shape) : 0}, x.scalar_type());
  if (shape.tokens == 0) return {out, hidden};

  const Inputs inputs(x, parameters);
  cuda::MlpForward args{shape, inputs.x().const_data_ptr(), inputs.fc1_weight().const_data_ptr(),
      inputs.fc1_bias(), inputs.fc2_weight().const_data_ptr(), inputs.fc2_bias(), inputs.scale(),
      inputs.shift(), inputs.branch_scale(), nullptr, nullptr,
      keep_hidden ? hidden.mutable_data_ptr() : nullptr, out.mutable_data_ptr()};
  const cuda::MlpLaunch launch = cuda::mlp_launch(args, storage);
  OptionalTensor normalized, activated;
  if (!launch.fused) {
    activated = values(launch.slab_tokens, shape.hidden);
    args.activated = activated->mutable_data_ptr();
    if (inputs.has_affine()) {
      normalized = values(launch.slab_tokens, shape.channels);
      args.normalized = normalized->mutable_data_ptr();
    }
  }
  cuda::mlp_forward(args, storage, launch, on.stream());
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_mlp_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& hidden, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& branch_scale) {
  const MlpParameters parameters{
      fc1_weight, fc1_bias, fc2_weight, std::nullopt, scale, shift, branch_scale};
  const auto shape = check_pointwise_mlp<cuda::MlpShape>(x, parameters);
  check_gradient(grad, x);
  check_device("grad", grad, x);
  if (hidden.has_value()) {
    check_shape("hidden", *hidden, {hidden_values(shape)});
    check_same_dtype("hidden", *hidden, "x", x);
    check_device("hidden", *hidden, x);
  }
  const cuda::Storage storage = storage_of(x);
  const Launch on(x);
  const int64_t channels = shape.channels, width = shape.hidden;
  const auto floats = [&](const std::vector<int64_t>& sizes) {
    return empty_beside(x, sizes, ScalarType::Float);
  };
  const auto values = [&](int64_t rows, int64_t columns) {
    return empty_beside(x, {rows, columns}, x.scalar_type());
  };
  Tensor grad_x = empty_channels_last(x);
  Tensor grad_fc1 = floats({width, channels}), grad_fc1_bias = floats({width});
  Tensor grad_fc2 = floats({channels, width}), grad_fc2_bias = floats({channels});
  Tensor grad_scale = floats({channels}), grad_shift = floats({channels});
  if (shape.tokens == 0) {
    for (Tensor* sum :
        {&grad_fc1, &grad_fc1_bias, &grad_fc2, &grad_fc2_bias, &grad_scale, &grad_shift}) {
      torch::stable::zero_(*sum);
    }
    return {grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias, grad_scale, grad_shift};
  }

  const Inputs inputs(x, parameters);
  const Tensor grad_source = as_channels_last(grad);
  const Tensor fc2_transposed = as_contiguous(torch::stable::transpose(inputs.fc2_weight(), 0, 1));
  OptionalTensor hidden_source;
  if (hidden.has_value()) hidden_source = as_contiguous(*hidden);
  cuda::MlpBackward args{};
  args.shape = shape;
  args.grad = grad_source.const_data_ptr();
  args.x = inputs.x().const_data_ptr();
  args.hidden = hidden_source.has_value() ? hidden_source->const_data_ptr() : nullptr;
  args.fc1_weight = inputs.fc1_weight().const_data_ptr();
  args.fc1_bias = inputs.fc1_bias();
  args.fc2_transposed = fc2_transposed.const_data_ptr();
  args.scale = inputs.scale();
  args.shift = inputs.shift();
  args.branch_scale = inputs.branch_scale();
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_fc1_bias = float_data(grad_fc1_bias);
  args.grad_fc2_bias = float_data(grad_fc2_bias);
  args.grad_scale = float_data(grad_scale);
  args.grad_shift = float_data(grad_shift);
  const cuda::MlpLaunch launch = cuda::mlp_launch(args, storage);
  const Tensor hidden_partials = floats({launch.hidden_slots, width});
  const Tensor channel_partials = floats({3, launch.channel_slots, channels});
  args.hidden_partials = float_data(hidden_partials);
  args.channel_partials = float_data(channel_partials);
  if (launch.fused) {
    const Tensor partials = floats({2, launch.hidden_slots, width * channels});
    args.fc1_partials = float_data(partials);
    args.fc2_partials = args.fc1_partials + launch.hidden_slots * width * channels;
    args.grad_fc1 = float_data(grad_fc1);
    args.grad_fc2 = float_data(grad_fc2);
    cuda::mlp_backward_fused(args, storage, launch, on.stream());
    return {grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias, grad_scale, grad_shift};
  }

  const int64_t rows = launch.slab_tokens, slabs = launch.slabs;
  const Tensor activated = values(rows, width), grad_hidden = values(rows, width);
  const Tensor grad_normalized = values(rows, channels);
  args.activated = activated.mutable_data_ptr();
  args.grad_hidden = grad_hidden.mutable_data_ptr();
  args.grad_normalized = grad_normalized.const_data_ptr();
  // What the weights' gradients read of z and G, where it is not x and grad.
  OptionalTensor normalized, grad_branch;
  if (inputs.has_affine()) {
    normalized = values(rows, channels);
    args.normalized = normalized->mutable_data_ptr();
  }
  if (branch_scale.has_value()) {
    grad_branch = values(rows, channels);
    args.grad_branch = grad_branch->mutable_data_ptr();
  }
  const Tensor x_rows = as_rows(inputs.x(), shape), grad_rows = as_rows(grad_source, shape);
  const Tensor fc1_partials = slabs > 1 ? floats({slabs * width, channels}) : grad_fc1;
  const Tensor fc2_partials = slabs > 1 ? floats({slabs * channels, width}) : grad_fc2;

  for (int64_t i = 0; i < slabs; ++i) {
    const cuda::MlpSlab slab = launch.slab(shape, i);
    const auto of_slab = [&](const Tensor& workspace) {
      return rows_from(workspace, 0, slab.tokens);
    };
    const auto source = [&](const OptionalTensor& workspace, const Tensor& all) {
      return workspace.has_value() ? of_slab(*workspace) : rows_from(all, slab.first, slab.tokens);
    };
    const auto transposed = [](const Tensor& matrix) {
      return torch::stable::transpose(matrix, 0, 1);
    };
    cuda::mlp_backward_hidden(args, storage, launch, slab, on.stream());
    multiply(of_slab(grad_hidden), inputs.fc1_weight(), of_slab(grad_normalized));
    multiply(transposed(of_slab(grad_hidden)), source(normalized, x_rows),
        rows_from(fc1_partials, i * width, width));
    multiply(transposed(source(grad_branch, grad_rows)), of_slab(activated),
        rows_from(fc2_partials, i * channels, channels));
    cuda::mlp_backward_tokens(args, storage, launch, slab, on.stream());
  }
  cuda::mlp_backward_sums(args, launch, on.stream());
  if (slabs > 1) {
    const int64_t weights = width * channels;
    cuda::mlp_backward_weight(
        float_data(fc1_partials), slabs, weights, float_data(grad_fc1), on.stream());
    cuda::mlp_backward_weight(
        float_data(fc2_partials), slabs, weights, float_data(grad_fc2), on.stream());
  }
  return {grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias, grad_scale, grad_shift};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("pointwise_mlp", TORCH_BOX(&dsnet::pointwise_mlp));
  m.impl("pointwise_mlp_backward", TORCH_BOX(&dsnet::pointwise_mlp_backward));
}
