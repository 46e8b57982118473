// Upsampling, concatenation and mixing on the CPU: interpolation, the choice of compiled kernels.
#include "upsample_concat.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"

namespace dsnet::cpu {

Axis::Axis(int64_t coarse, int64_t fine)
    : index_(static_cast<size_t>(fine)),
      fraction_(static_cast<size_t>(fine)),
      begin_(static_cast<size_t>(coarse) + 1) {
  const double scale = static_cast<double>(coarse) / static_cast<double>(fine);
  for (size_t i = 0; i < index_.size(); ++i) {
    const double source = std::max(0.0, (static_cast<double>(i) + 0.5) * scale - 0.5);
    index_[i] = std::min(static_cast<int64_t>(source), coarse - 1);
    // Behind the centre of the last there is nothing to interpolate with.
    fraction_[i] = index_[i] < coarse - 1 ? source - std::floor(source) : 0.0;
  }
  for (size_t j = 0; j < begin_.size(); ++j) {
    const auto found = std::lower_bound(index_.begin(), index_.end(), static_cast<int64_t>(j));
    begin_[j] = found - index_.begin();
  }
}

DSNET_DISPATCH_BF16(UpsampleForwardKernels, upsample_concat_forward)
DSNET_DISPATCH_BF16(UpsampleBackwardKernels, upsample_concat_backward)

}  // namespace dsnet::cpu
