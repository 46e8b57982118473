// Depthwise 3×3 convolution on NVIDIA GPUs: checks, allocation, registration.
#include "cuda/depthwise_conv3x3.h"

#include "bindings/cuda/launch.h"

namespace dsnet {

Tensor depthwise_conv3x3(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, bool residual) {
  const auto shape = check_depthwise<cuda::DepthwiseShape>(x, weight, bias, scale, shift);
  const cuda::Storage storage = storage_of(x);
  const Launch on(x);
  Tensor out = empty_channels_last(x);
  if (shape.batch == 0) return out;

  const Tensor source = with_adjacent_channels(x);
  const Values w("weight", weight, x), b("bias", bias, x);
  const Values s("scale", scale, x), t("shift", shift, x);
  const cuda::DepthwiseForward args{shape, pixels_of<cuda::Pixels>(source), w.view(), b.view(),
      s.view(), t.view(), residual, out.mutable_data_ptr()};
  cuda::depthwise_forward(args, storage, cuda::depthwise_launch(args, storage), on.stream());
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv3x3_backward(const Tensor& grad, const Tensor& x,
    const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift, bool residual) {
  const auto shape = check_depthwise<cuda::DepthwiseShape>(x, weight, std::nullopt, scale, shift);
  check_gradient(grad, x);
  check_device("grad", grad, x);
  const cuda::Storage storage = storage_of(x);
  const Launch on(x);
  constexpr int64_t gradient_rows = cuda::DepthwiseBackward::gradient_rows;
  Tensor grad_x = empty_channels_last(x);
  Tensor rows = empty_beside(x, {gradient_rows, shape.channels}, ScalarType::Float);
  if (shape.batch == 0) {
    torch::stable::zero_(rows);
    return {grad_x, rows};
  }

  const Tensor grad_source = with_adjacent_channels(grad);
  const Tensor source = with_adjacent_channels(x);
  const Values w("weight", weight, x), s("scale", scale, x), t("shift", shift, x);
  cuda::DepthwiseBackward args{shape, pixels_of<cuda::Pixels>(grad_source),
      pixels_of<cuda::Pixels>(source), w.view(), s.view(), t.view(), residual,
      grad_x.mutable_data_ptr(), nullptr, float_data(rows)};
  const cuda::DepthwiseLaunch launch = cuda::depthwise_launch(args, storage);
  const Tensor partials =
      empty_beside(x, {launch.slots(), gradient_rows, shape.channels}, ScalarType::Float);
  args.partials = float_data(partials);
  cuda::depthwise_backward(args, storage, launch, on.stream());
  return {grad_x, rows};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("depthwise_conv3x3", TORCH_BOX(&dsnet::depthwise_conv3x3));
  m.impl("depthwise_conv3x3_backward", TORCH_BOX(&dsnet::depthwise_conv3x3_backward));
}
