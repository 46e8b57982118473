#include "cuda/co_attention.cuh"

namespace dsnet::cuda {

DSNET_CO_ATTENTION_LAUNCHES(, float);
DSNET_CO_ATTENTION_LAUNCHES(, __nv_bfloat16);
DSNET_CO_ATTENTION_LAUNCHES(, __half);

size_t co_attention_workspace(
    const CoAttentionForward& args, Storage storage, const CoAttentionLaunch& l) {
  CoAttentionForward counted = args;
  counted.workspace = nullptr;
  return CoAttentionForwardParts(counted, storage, l).carver.used();
}

void co_attention_forward(const CoAttentionForward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream) {
  if (args.shape.batch == 0) return;
  with_storage(
      storage, [&](auto zero) { co_attention_forward_of<decltype(zero)>(args, l, stream); });
}

}  // namespace dsnet::cuda
