// Upsampling, concatenation and 1×1 mixing on NVIDIA GPUs: checks, allocation, registration.
#include "cuda/upsample_concat.h"

#include "bindings/cuda/launch.h"

namespace dsnet {
namespace {

// Everything that both directions read, alive as long as this is.
class Inputs {
 public:
  Inputs(const Tensor& local, const Tensor& global, const Tensor& weight,
      const OptionalTensor& branch_scale)
      : local_(as_channels_last(local)),
        global_(as_channels_last(global)),
        weight_(with_dtype_of(local, "weight", weight, "local")),
        branch_scale_("branch_scale", branch_scale, local, "local") {
    check_device("global_", global, local, "local");
  }

  const void* local() const { return local_.const_data_ptr(); }
  const void* global() const { return global_.const_data_ptr(); }
  const void* weight() const { return weight_.const_data_ptr(); }
  cuda::Parameter branch_scale() const { return branch_scale_.view(); }

 private:
  Tensor local_, global_, weight_;
  Values branch_scale_;
};

// A gradient or residual: (B, C, H, W) beside local.
void check_mixed(
    const char* name, const Tensor& tensor, const Tensor& local, const cuda::UpsampleShape& shape) {
  check_shape(name, tensor, {shape.batch, shape.channels, shape.height, shape.width});
  check_same_dtype(name, tensor, "local", local);
  check_device(name, tensor, local, "local");
}

}  // namespace

Tensor upsample_concat(const Tensor& local, const Tensor& global_, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& branch_scale) {
  const auto shape =
      check_upsample_concat<cuda::UpsampleShape>(local, global_, weight, branch_scale);
  check_shape("bias", bias, {shape.channels});
  if (residual.has_value()) check_mixed("residual", *residual, local, shape);
  const cuda::Storage storage = storage_of(local, "local");
  const Launch on(local);
  Tensor out = torch::stable::empty({shape.batch, shape.channels, shape.height, shape.width},
      local.scalar_type(), std::nullopt, local.device(), std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  if (shape.batch * shape.channels == 0) return out;

  const Inputs inputs(local, global_, weight, branch_scale);
  const Values b("bias", bias, local, "local");
  OptionalTensor added;
  if (residual.has_value()) added = as_channels_last(*residual);
  const Tensor mixed =
      empty_beside(local, {shape.batch, shape.cells, shape.channels}, ScalarType::Float);
  const cuda::UpsampleForward args{shape, inputs.local(), inputs.global(), inputs.weight(),
      b.view(), added.has_value() ? added->const_data_ptr() : nullptr, inputs.branch_scale(),
      float_data(mixed), out.mutable_data_ptr()};
  cuda::upsample_forward(args, storage, cuda::upsample_launch(args, storage), on.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_concat_backward(const Tensor& grad,
    const Tensor& local, const Tensor& global_, const Tensor& weight,
    const OptionalTensor& branch_scale) {
  const auto shape =
      check_upsample_concat<cuda::UpsampleShape>(local, global_, weight, branch_scale);
  check_mixed("grad", grad, local, shape);
  const cuda::Storage storage = storage_of(local, "local");
  const Launch on(local);
  const auto floats = [&](const std::vector<int64_t>& sizes) {
    return empty_beside(local, sizes, ScalarType::Float);
  };
  Tensor grad_local = empty_channels_last(local), grad_global = empty_channels_last(global_);
  Tensor grad_weight = floats({shape.channels, shape.weight_columns});
  Tensor grad_bias = floats({shape.channels});
  if (shape.batch * shape.channels == 0) {
    for (Tensor* sum : {&grad_local, &grad_global, &grad_weight, &grad_bias}) {
      torch::stable::zero_(*sum);
    }
    return {grad_local, grad_global, grad_weight, grad_bias};
  }

  const Inputs inputs(local, global_, weight, branch_scale);
  const Tensor grad_source = as_channels_last(grad);
  const Tensor grad_mixed = floats({shape.batch, shape.cells, shape.channels});
  cuda::UpsampleBackward args{shape, grad_source.const_data_ptr(), inputs.local(), inputs.global(),
      inputs.weight(), inputs.branch_scale(), float_data(grad_mixed), grad_local.mutable_data_ptr(),
      grad_global.mutable_data_ptr(), nullptr, float_data(grad_weight), float_data(grad_bias)};
  const cuda::UpsampleLaunch launch = cuda::upsample_launch(args, storage);
  const Tensor partials = floats({launch.slots, shape.channels, shape.weight_columns + 1});
  args.partials = float_data(partials);
  cuda::upsample_backward(args, storage, launch, on.stream());
  return {grad_local, grad_global, grad_weight, grad_bias};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("upsample_concat", TORCH_BOX(&dsnet::upsample_concat));
  m.impl("upsample_concat_backward", TORCH_BOX(&dsnet::upsample_concat_backward));
}
