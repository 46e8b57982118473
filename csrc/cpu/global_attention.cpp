// Global self-attention on the CPU: the choice of the compiled kernels.
#include "global_attention.h"

namespace dsnet::cpu {

#define DSNET_DECLARE(arch)                                            \
  namespace arch {                                                     \
  AttentionForwardKernels global_attention_forward(Storage storage);   \
  AttentionBackwardKernels global_attention_backward(Storage storage); \
  }
DSNET_DECLARE(generic)
#ifdef DSNET_X86
DSNET_DECLARE(avx2)
DSNET_DECLARE(avx512)
DSNET_DECLARE(avx512_bf16)
#endif
#undef DSNET_DECLARE

AttentionForwardKernels global_attention_forward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability == Capability::avx512_bf16) return avx512_bf16::global_attention_forward(storage);
  if (capability == Capability::avx512) return avx512::global_attention_forward(storage);
  if (capability == Capability::avx2) return avx2::global_attention_forward(storage);
#endif
  return generic::global_attention_forward(storage);
}

AttentionBackwardKernels global_attention_backward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  // Gradients keep the products of values: of pairs they would be rounded before they are summed.
  if (capability >= Capability::avx512) return avx512::global_attention_backward(storage);
  if (capability == Capability::avx2) return avx2::global_attention_backward(storage);
#endif
  return generic::global_attention_backward(storage);
}

}  // namespace dsnet::cpu
