// The operators on the CPU: checks, allocation, threads, registration with torch's stable ABI.
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/capability.h"
#include "cpu/depthwise_conv3x3.h"

namespace dsnet {
namespace {

cpu::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cpu::Storage::float32;
    case ScalarType::BFloat16: return cpu::Storage::bfloat16;
    case ScalarType::Double: return cpu::Storage::float64;
    default:
      throw std::runtime_error(std::string("x: expected float32, bfloat16 or float64, got ") +
                               torch::headeronly::toString(x.scalar_type()));
  }
}

template <typename Acc, typename T>
void widen(const Tensor& contiguous, Acc* out) {
  const T* data = static_cast<const T*>(contiguous.const_data_ptr());
  std::copy(data, data + contiguous.numel(), out);
}

// A parameter's values as accumulators, in order; `absent` where there is none.
template <typename Acc>
std::vector<Acc> values_of(
    const char* name, const OptionalTensor& parameter, int64_t count, Acc absent) {
  std::vector<Acc> values(static_cast<size_t>(count), absent);
  if (!parameter.has_value()) return values;
  // Asked first, since a call of torch costs more than all the values.
  const Tensor contiguous =
      parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
  switch (contiguous.scalar_type()) {
    case ScalarType::Float: widen<Acc, float>(contiguous, values.data()); break;
    case ScalarType::BFloat16:
      widen<Acc, torch::headeronly::BFloat16>(contiguous, values.data());
      break;
    case ScalarType::Double:
      // Narrowing a float64 parameter beside a float32 x would lose digits unseen.
      if constexpr (std::is_same_v<Acc, double>) {
        widen<Acc, double>(contiguous, values.data());
        break;
      }
      [[fallthrough]];
    default:
      check(false, name, ": expected x's dtype or float32, got ",
          torch::headeronly::toString(contiguous.scalar_type()));
  }
  return values;
}

template <typename F>
void with_accumulator(cpu::Storage storage, const F& body) {
  if (storage == cpu::Storage::float64) {
    body(double{});
  } else {
    body(float{});
  }
}

// Coefficients in the kernels' layout, rows(k, c) set one by one.
template <typename Args, typename Acc>
class Coefficients {
 public:
  explicit Coefficients(int64_t channels)
      : values_(static_cast<size_t>((channels + lanes - 1) / lanes * Args::coefficient_rows)) {}

  Acc& operator()(int64_t k, int64_t c) {
    return values_[static_cast<size_t>(c / lanes * Args::coefficient_rows + k)].lane[c % lanes];
  }
  const Acc* data() const { return values_.data()->lane; }

 private:
  static constexpr int64_t lanes = cpu::coefficient_lanes;
  struct alignas(64) Row {
    Acc lane[lanes];
  };
  std::vector<Row> values_;
};

template <typename Acc>
Coefficients<cpu::DepthwiseForward, Acc> forward_coefficients(const cpu::DepthwiseShape& shape,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, bool residual) {
  const int64_t C = shape.channels;
  const auto w = values_of<Acc>("weight", weight, 9 * C, 0);
  const auto b = values_of<Acc>("bias", bias, C, 0);
  const auto s = values_of<Acc>("scale", scale, C, 1);
  const auto t = values_of<Acc>("shift", shift, C, 0);
  Coefficients<cpu::DepthwiseForward, Acc> rows(C);
  for (int64_t c = 0; c < C; ++c) {
    Acc tap[3][3];
    for (int u = 0; u < 3; ++u) {
      for (int v = 0; v < 3; ++v) {
        const bool outside = (u != 1 && shape.height == 1) || (v != 1 && shape.width == 1);
        tap[u][v] = outside ? Acc{0} : w[9 * c + 3 * u + v];
        rows(3 * u + v, c) = tap[u][v] * s[c] + (residual && u == 1 && v == 1 ? 1 : 0);
      }
    }
    // Sums over the taps inside the image: along each row of taps, then over the rows.
    Acc sums[3][3];
    for (int u = 0; u < 3; ++u) {
      sums[u][0] = tap[u][1] + tap[u][2];
      sums[u][1] = tap[u][0] + tap[u][1] + tap[u][2];
      sums[u][2] = tap[u][0] + tap[u][1];
    }
    for (int v = 0; v < 3; ++v) {
      rows(9 + v, c) = b[c] + t[c] * (sums[1][v] + sums[2][v]);
      rows(12 + v, c) = b[c] + t[c] * (sums[0][v] + sums[1][v] + sums[2][v]);
      rows(15 + v, c) = b[c] + t[c] * (sums[0][v] + sums[1][v]);
    }
  }
  return rows;
}

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
    rows(10, c) = t[c];
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
    const auto coefficients =
        forward_coefficients<Acc>(shape, weight, bias, scale, shift, residual);
    const cpu::DepthwiseForward args{
        shape, pixels_of<cpu::Pixels>(source), coefficients.data(), out.mutable_data_ptr()};
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
