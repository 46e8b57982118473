// Bilinear interpolation along one axis.
#include "taps.h"

#include <algorithm>
#include <cmath>

namespace dsnet::cpu {

Axis::Axis(int64_t sources, int64_t samples)
    : index_(static_cast<size_t>(samples)),
      fraction_(static_cast<size_t>(samples)),
      begin_(static_cast<size_t>(sources) + 1) {
  const double scale = static_cast<double>(sources) / static_cast<double>(samples);
  for (size_t i = 0; i < index_.size(); ++i) {
    const double source = std::max(0.0, (static_cast<double>(i) + 0.5) * scale - 0.5);
    index_[i] = std::min(static_cast<int64_t>(source), sources - 1);
    // Behind the centre of the last there is nothing to interpolate with.
    fraction_[i] = index_[i] < sources - 1 ? source - std::floor(source) : 0.0;
  }
  for (size_t j = 0; j < begin_.size(); ++j) {
    const auto found = std::lower_bound(index_.begin(), index_.end(), static_cast<int64_t>(j));
    begin_[j] = found - index_.begin();
  }
}

}  // namespace dsnet::cpu
