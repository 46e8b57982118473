#include "cuda/co_attention_backward.cuh"

namespace dsnet::cuda {

DSNET_CO_ATTENTION_BACKWARD_KEYS(, float);
DSNET_CO_ATTENTION_BACKWARD_KEYS(, __nv_bfloat16);
DSNET_CO_ATTENTION_BACKWARD_KEYS(, __half);

}  // namespace dsnet::cuda
