// Depthwise 3×3 convolution on the CPU: checks, allocation, threads, registration.
#include "cpu/depthwise_conv3x3.h"

#include <algorithm>
#include <vector>

#include "bindings/cpu/depthwise_coefficients.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

template <typename Acc>
Coefficients<cpu::DepthwiseBackward, Acc> backward_coefficients(const cpu::DepthwiseShape& shape,
    const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift) {
  const int64_t C = shape.channels;
  const auto w = values_of<Acc>("weight", weight, 9 * C, 0);
  const auto s = values_of<Acc>("scale", scale, C, 1);
  const auto t = values_of<Acc>("shift", shift, C, 0);
  Coefficients<cpu::DepthwiseBackward, Acc> rows(C);
  for (int64_t c = 0; c < C; ++c) {
    for (int k = 0; k < 9; ++k) rows(k, c) = w[9 * c + k];
    rows(9, c) = s[c];
    const Acc centre = centre_of(s[c], t[c]);
    rows(10, c) = centre;
    rows(11, c) = std::fma(s[c], centre, t[c]);
  }
  return rows;
}

// Sums the slots in order, in double, whatever thread wrote them.
template <typename Acc>
void sum_slots(const Acc* partials, int64_t slots, int64_t values, Acc* out) {
  torch::stable::parallel_for(0, values, 4096, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(end - begin), 0.0);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Acc* p = partials + slot * values + begin;
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += static_cast<double>(p[i]);
    }
    std::copy(sums.begin(), sums.end(), out + begin);
  });
}

}  // namespace

Tensor depthwise_conv3x3(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, bool residual) {
  const auto shape = check_depthwise<cpu::DepthwiseShape>(x, weight, bias, scale, shift);
  const cpu::Storage storage = storage_of(x);
  Tensor out = empty_channels_last(x);
  if (shape.batch == 0) return out;

  const Tensor source = with_adjacent_channels(x);
  const cpu::DepthwiseTasks tasks(shape);
  const auto kernel = cpu::depthwise_forward(cpu::capability(), storage);
  with_accumulator(storage, [&](auto zero) {
    using Acc = decltype(zero);
    const auto coefficients = forward_coefficients<Acc>(shape, weight, bias, scale, shift);
    const cpu::DepthwiseForward args{shape, pixels_of<cpu::Pixels>(source), coefficients.data(),
        shift.has_value(), residual, out.mutable_data_ptr()};
    torch::stable::parallel_for(
        0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv3x3_backward(const Tensor& grad, const Tensor& x,
    const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift, bool residual) {
  const auto shape = check_depthwise<cpu::DepthwiseShape>(x, weight, std::nullopt, scale, shift);
  check_gradient(grad, x);
  const cpu::Storage storage = storage_of(x);
  Tensor grad_x = empty_channels_last(x);
  const bool wide = storage == cpu::Storage::float64;
  const ScalarType accumulator = wide ? ScalarType::Double : ScalarType::Float;
  constexpr int64_t gradient_rows = cpu::DepthwiseBackward::gradient_rows;
  Tensor rows =
      torch::stable::empty({gradient_rows, shape.channels}, accumulator, std::nullopt, x.device());
  if (shape.batch == 0) {
    torch::stable::zero_(rows);
    return {grad_x, rows};
  }

  const Tensor grad_source = with_adjacent_channels(grad);
  const Tensor source = with_adjacent_channels(x);
  const cpu::DepthwiseTasks tasks(shape);
  const int64_t slots = shape.batch * tasks.strips;
  const Tensor partials = torch::stable::empty(
      {slots, gradient_rows, shape.channels}, accumulator, std::nullopt, x.device());
  const auto kernel = cpu::depthwise_backward(cpu::capability(), storage);
  with_accumulator(storage, [&](auto zero) {
    using Acc = decltype(zero);
    const auto coefficients = backward_coefficients<Acc>(shape, weight, scale, shift);
    const cpu::DepthwiseBackward args{shape, pixels_of<cpu::Pixels>(grad_source),
        pixels_of<cpu::Pixels>(source), coefficients.data(), residual, grad_x.mutable_data_ptr(),
        partials.mutable_data_ptr()};
    torch::stable::parallel_for(
        0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    sum_slots<Acc>(static_cast<const Acc*>(partials.const_data_ptr()), slots,
        gradient_rows * shape.channels, static_cast<Acc*>(rows.mutable_data_ptr()));
  });
  return {grad_x, rows};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("depthwise_conv3x3", TORCH_BOX(&dsnet::depthwise_conv3x3));
  m.impl("depthwise_conv3x3_backward", TORCH_BOX(&dsnet::depthwise_conv3x3_backward));
}
