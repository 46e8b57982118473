#include "cuda/pointwise_mlp.cuh"

namespace dsnet::cuda {

DSNET_MLP_AFFINE(, float);
DSNET_MLP_AFFINE(, __nv_bfloat16);
DSNET_MLP_AFFINE(, __half);

void mlp_forward(const MlpForward& args, Storage storage, const MlpLaunch& l, CUstream_st* stream) {
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (l.fused) {
        const auto fused = args.shape.channels > 64 ? launch_fused<T, 128> : launch_fused<T, 64>;
        return fused(args, l, stream);
      }
    }
    for (int64_t i = 0; i < l.slabs; ++i) forward_slab<T>(args, l, l.slab(args.shape, i), stream);
  });
}

}  // namespace dsnet::cuda
