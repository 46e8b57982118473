// The block's MLP with packed weights on the CPU: the choice of the compiled kernels.
#include "packed_mlp.h"

#include "dispatch.h"

namespace dsnet::cpu {

DSNET_DISPATCH_BF16(PackedMlpKernels, packed_mlp)

}  // namespace dsnet::cpu
