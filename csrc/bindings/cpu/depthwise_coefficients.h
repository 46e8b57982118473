// Parameters of the depthwise convolution in the kernels' layout.
#pragma once

#include <cmath>
#include <vector>

#include "bindings/cpu/parameters.h"
#include "cpu/depthwise_conv3x3.h"

namespace dsnet {

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

// Where scale·x + shift is 0, or 0 where that is nowhere.
template <typename Acc>
Acc centre_of(Acc scale, Acc shift) {
  const Acc quotient = -shift / scale;
  return std::isfinite(quotient) ? quotient : Acc{0};
}

template <typename Acc>
Coefficients<cpu::DepthwiseForward, Acc> forward_coefficients(const cpu::DepthwiseShape& shape,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift) {
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
        rows(3 * u + v, c) = tap[u][v] * s[c];
      }
    }
    const Acc centre = centre_of(s[c], t[c]);
    const Acc rest = std::fma(s[c], centre, t[c]);
    rows(18, c) = centre;
    // Sums over the taps inside the image: along each row of taps, then over the rows.
    Acc sums[3][3];
    for (int u = 0; u < 3; ++u) {
      sums[u][0] = tap[u][1] + tap[u][2];
      sums[u][1] = tap[u][0] + tap[u][1] + tap[u][2];
      sums[u][2] = tap[u][0] + tap[u][1];
    }
    for (int v = 0; v < 3; ++v) {
      rows(9 + v, c) = b[c] + rest * (sums[1][v] + sums[2][v]);
      rows(12 + v, c) = b[c] + rest * (sums[0][v] + sums[1][v] + sums[2][v]);
      rows(15 + v, c) = b[c] + rest * (sums[0][v] + sums[1][v]);
    }
  }
  return rows;
}

}  // namespace dsnet
