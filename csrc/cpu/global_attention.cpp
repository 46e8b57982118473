// Global self-attention on the CPU: the choice of the compiled kernels.
#include "global_attention.h"

#include "dispatch.h"

namespace dsnet::cpu {

DSNET_DISPATCH_BF16(AttentionForwardKernels, global_attention_forward)
// Gradients keep the products of values: of pairs they would be rounded before they are summed.
DSNET_DISPATCH(AttentionBackwardKernels, global_attention_backward)

}  // namespace dsnet::cpu
