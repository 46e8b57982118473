// The block's MLP on the CPU: the choice of compiled kernels.
#include "pointwise_mlp.h"

namespace dsnet::cpu {

#define DSNET_DECLARE(arch)                                   \
  namespace arch {                                            \
  MlpForwardKernels pointwise_mlp_forward(Storage storage);   \
  MlpBackwardKernels pointwise_mlp_backward(Storage storage); \
  }
DSNET_DECLARE(generic)
#ifdef DSNET_X86
DSNET_DECLARE(avx2)
DSNET_DECLARE(avx512)
DSNET_DECLARE(avx512_bf16)
#endif
#undef DSNET_DECLARE

MlpForwardKernels pointwise_mlp_forward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability == Capability::avx512_bf16) return avx512_bf16::pointwise_mlp_forward(storage);
  if (capability == Capability::avx512) return avx512::pointwise_mlp_forward(storage);
  if (capability == Capability::avx2) return avx2::pointwise_mlp_forward(storage);
#endif
  return generic::pointwise_mlp_forward(storage);
}

MlpBackwardKernels pointwise_mlp_backward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability == Capability::avx512_bf16) return avx512_bf16::pointwise_mlp_backward(storage);
  if (capability == Capability::avx512) return avx512::pointwise_mlp_backward(storage);
  if (capability == Capability::avx2) return avx2::pointwise_mlp_backward(storage);
#endif
  return generic::pointwise_mlp_backward(storage);
}

}  // namespace dsnet::cpu
