// The block's MLP on the CPU: the choice of the compiled kernels.
#include "pointwise_mlp.h"

#include "dispatch.h"

namespace dsnet::cpu {

DSNET_DISPATCH_BF16(MlpForwardKernels, pointwise_mlp_forward)
DSNET_DISPATCH_BF16(MlpBackwardKernels, pointwise_mlp_backward)

}  // namespace dsnet::cpu
