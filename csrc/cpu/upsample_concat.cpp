// Upsampling, concatenation and mixing on the CPU: the choice of the compiled kernels.
#include "upsample_concat.h"

#include "dispatch.h"

namespace dsnet::cpu {

DSNET_DISPATCH_BF16(UpsampleForwardKernels, upsample_concat_forward)
DSNET_DISPATCH_BF16(UpsampleBackwardKernels, upsample_concat_backward)

}  // namespace dsnet::cpu
