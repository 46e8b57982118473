#include "cuda/co_attention.cuh"

namespace dsnet::cuda {

DSNET_CO_ATTENTION_GLOBAL(, float);
DSNET_CO_ATTENTION_GLOBAL(, __nv_bfloat16);
DSNET_CO_ATTENTION_GLOBAL(, __half);

}  // namespace dsnet::cuda
