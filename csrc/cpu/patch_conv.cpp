// Convolutions of patches on the CPU: the choice of the compiled kernels.
#include "patch_conv.h"

#include "dispatch.h"

namespace dsnet::cpu {

DSNET_DISPATCH_BF16(PatchConvKernels, patch_conv)

}  // namespace dsnet::cpu
