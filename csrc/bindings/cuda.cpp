// The operators on NVIDIA GPUs: checks, allocation, registration with torch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "bindings/arguments.h"
#include "cuda/depthwise_conv3x3.h"

namespace dsnet {
namespace {

cuda::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cuda::Storage::float32;
    case ScalarType::BFloat16: return cuda::Storage::bfloat16;
    case ScalarType::Half: return cuda::Storage::float16;
    default:
      throw std::runtime_error(std::string("x: expected float32, bfloat16 or float16, got ") +
                               torch::headeronly::toString(x.scalar_type()));
  }
}

// The device of a call made current, and torch's stream on it: kernels are launched with both.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_;
};

// A parameter's contiguous values, alive as long as this is.
class Values {
 public:
  Values(const char* name, const OptionalTensor& parameter, const Tensor& x) {
    if (!parameter.has_value()) return;
    check(parameter->get_device_index() == x.get_device_index() && parameter->is_cuda(), name,
        ": expected x's device");
    const ScalarType dtype = parameter->scalar_type();
    check(dtype == x.scalar_type() || dtype == ScalarType::Float, name,
        ": expected x's dtype or float32, got ", torch::headeronly::toString(dtype));
    held_ = torch::stable::contiguous(*parameter);
    view_ = {held_->const_data_ptr(), dtype == ScalarType::Float};
  }
  cuda::Parameter view() const { return view_; }

 private:
  OptionalTensor held_;
  cuda::Parameter view_;
};

}  // namespace

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
  check(grad.is_cuda() && grad.get_device_index() == x.get_device_index(),
      "grad: expected x's device");
  const cuda::Storage storage = storage_of(x);
  const Launch on(x);
  constexpr int64_t gradient_rows = cuda::DepthwiseBackward::gradient_rows;
  Tensor grad_x = empty_channels_last(x);
  Tensor rows = torch::stable::empty(
      {gradient_rows, shape.channels}, ScalarType::Float, std::nullopt, x.device());
  if (shape.batch == 0) {
    torch::stable::zero_(rows);
    return {grad_x, rows};
  }

  const Tensor grad_source = with_adjacent_channels(grad);
  const Tensor source = with_adjacent_channels(x);
  const Values w("weight", weight, x), s("scale", scale, x), t("shift", shift, x);
  cuda::DepthwiseBackward args{shape, pixels_of<cuda::Pixels>(grad_source),
      pixels_of<cuda::Pixels>(source), w.view(), s.view(), t.view(), residual,
      grad_x.mutable_data_ptr(), nullptr, static_cast<float*>(rows.mutable_data_ptr())};
  const cuda::DepthwiseLaunch launch = cuda::depthwise_launch(args, storage);
  const Tensor partials = torch::stable::empty(
      {launch.slots(), gradient_rows, shape.channels}, ScalarType::Float, std::nullopt, x.device());
  args.partials = static_cast<float*>(partials.mutable_data_ptr());
  cuda::depthwise_backward(args, storage, launch, on.stream());
  return {grad_x, rows};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("depthwise_conv3x3", TORCH_BOX(&dsnet::depthwise_conv3x3));
  m.impl("depthwise_conv3x3_backward", TORCH_BOX(&dsnet::depthwise_conv3x3_backward));
}
