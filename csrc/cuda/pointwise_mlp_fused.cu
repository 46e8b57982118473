#include "cuda/pointwise_mlp.cuh"

namespace dsnet::cuda {

DSNET_MLP_FUSED(, __nv_bfloat16);
DSNET_MLP_FUSED(, __half);

}  // namespace dsnet::cuda
