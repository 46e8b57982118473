// Depthwise 3×3 convolution on the CPU: tasks, and the choice of the compiled kernel.
#include "depthwise_conv3x3.h"

#include <algorithm>

namespace dsnet::cpu {

#define DSNET_DECLARE(arch)                                    \
  namespace arch {                                             \
  DepthwiseForwardKernel depthwise_forward(Storage storage);   \
  DepthwiseBackwardKernel depthwise_backward(Storage storage); \
  }
DSNET_DECLARE(generic)
#ifdef DSNET_X86
DSNET_DECLARE(avx2)
DSNET_DECLARE(avx512)
#endif
#undef DSNET_DECLARE

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

DepthwiseForwardKernel depthwise_forward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability >= Capability::avx512) return avx512::depthwise_forward(storage);
  if (capability == Capability::avx2) return avx2::depthwise_forward(storage);
#endif
  return generic::depthwise_forward(storage);
}

DepthwiseBackwardKernel depthwise_backward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability >= Capability::avx512) return avx512::depthwise_backward(storage);
  if (capability == Capability::avx2) return avx2::depthwise_backward(storage);
#endif
  return generic::depthwise_backward(storage);
}

}  // namespace dsnet::cpu
