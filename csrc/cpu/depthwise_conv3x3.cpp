// Depthwise 3×3 convolution on the CPU: tasks, and the choice of the compiled kernel.
#include "depthwise_conv3x3.h"

#include <algorithm>

#include "dispatch.h"

namespace dsnet::cpu {

DepthwiseTasks::DepthwiseTasks(const DepthwiseShape& shape) {
  strips = (shape.height + rows_per_strip - 1) / rows_per_strip;
  blocks = (shape.channels + channels_per_block - 1) / channels_per_block;
  count = shape.batch * strips * blocks;
  // About 20 µs of work: less is not worth waking a thread.
  constexpr int64_t values_per_grain = 65536;
  const int64_t values = std::min(rows_per_strip, shape.height) * shape.width *
                         std::min(channels_per_block, shape.channels);
  grain = std::max<int64_t>(1, values_per_grain / std::max<int64_t>(1, values));
}

DSNET_DISPATCH(DepthwiseForwardKernel, depthwise_forward)
DSNET_DISPATCH(DepthwiseBackwardKernel, depthwise_backward)

}  // namespace dsnet::cpu
