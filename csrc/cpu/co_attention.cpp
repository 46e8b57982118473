// Bidirectional co-attention on the CPU: sizes, and the choice of the compiled kernels.
#include "co_attention.h"

namespace dsnet::cpu {

namespace {

int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t scratch_of(const CoAttentionShape& shape, const CoAttentionLayout& layout, bool backward) {
  using Layout = CoAttentionLayout;
  const int64_t M = shape.global_tokens, tile = layout.tile, d = shape.head_dim;
  const int64_t prologue = M * (2 * layout.global + layout.head + layout.dim);
  const int64_t rows = larger_of(layout.rows, Layout::row_block);
  const int64_t tokens = 3 * layout.local + padded(shape.local_width) + 6 * d + 4 * layout.dim;
  const int64_t scores = backward ? 2 * rows + 2 * Layout::row_block + layout.rows : rows;
  int64_t local = tile * (tokens + scores + 8) + 2 * Layout::row_block;
  if (backward) {
    local += tile * (2 * layout.local + padded(shape.local_width) + 6 * d + 6 * layout.dim);
    local += larger_of(rows, 3 * Layout::row_block) * layout.inner + 12 * layout.local;
  }
  const int64_t finish = Layout::finish_block * (layout.inner + layout.dim + 2 * layout.global + 2) +
                         4 * layout.global;
  const int64_t heads = M * (layout.head + 4 * layout.dim + layout.inner) + 4 * layout.rows;
  const int64_t widest = larger_of(larger_of(layout.local, layout.global), padded(shape.dim()));
  const int64_t product =
      TokenProduct::row_block * (TokenProduct::depth + 2 * widest + lanes);
  const int64_t most = larger_of(larger_of(prologue, local), finish);
  return (backward ? larger_of(most, larger_of(heads, product)) : most) + 64 * lanes;
}

#define DSNET_DECLARE(arch)                                    \
  namespace arch {                                             \
  CoAttentionForwardKernels co_attention_forward(Storage storage);   \
  CoAttentionBackwardKernels co_attention_backward(Storage storage); \
  }
DSNET_DECLARE(generic)
#ifdef DSNET_X86
DSNET_DECLARE(avx2)
DSNET_DECLARE(avx512)
DSNET_DECLARE(avx512_bf16)
#endif
#undef DSNET_DECLARE

CoAttentionForwardKernels co_attention_forward(Capability capability, Storage storage) {
#ifdef DSNET_X86
  if (capability == Capability::avx512_bf16) return avx512_bf16::co_attention_forward(storage);
  if (capability == Capability::avx512) return avx512::co_attention_forward(storage);
  if (capability == Capability::avx2) return avx2::co_attention_forward(storage);
#endif
  return generic::co_attention_forward(storage);
}

}  // namespace dsnet::cpu
