// Bidirectional co-attention on the CPU: sizes, and the choice of the compiled kernels.
#include "co_attention.h"

#include "dispatch.h"

namespace dsnet::cpu {

namespace {

int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int64_t scratch_of(const CoAttentionShape& shape, const CoAttentionLayout& layout, bool backward) {
  using Layout = CoAttentionLayout;
  const int64_t M = shape.global_tokens, tile = layout.tile, d = shape.head_dim;
  const int64_t Cl = padded(shape.local_width), block = Layout::finish_block;
  const int64_t rows = larger_of(M, Layout::row_block);
  constexpr int64_t rounding = 32 * lanes;  // Each piece is padded.
  const int64_t inputs = M * (layout.global + layout.head + layout.dim);
  const int64_t finish = block * (layout.inner + layout.dim + layout.global + shape.dim() + 1);
  if (!backward) {
    int64_t local = tile * (3 * layout.local + Cl + rows + 2) + 2 * Layout::row_block;
    if (!layout.absorbed) local += tile * (2 * d + layout.head + layout.dim);
    return larger_of(larger_of(inputs, finish), local) + rounding;
  }
  int64_t local = tile * (3 * layout.local + 2 * Cl + 3 * rows + d + layout.dim + 2);
  if (!layout.absorbed) local += tile * (3 * d + 4 * layout.dim + layout.head);
  const int64_t heads = M * (layout.inner + layout.dim) + layout.rows;
  const int64_t widest = larger_of(larger_of(layout.local, layout.global), padded(shape.dim()));
  const int64_t weights = TokenProduct::scratch(widest);
  return larger_of(larger_of(larger_of(inputs, finish), larger_of(local, heads)), weights) +
         rounding;
}

DSNET_DISPATCH_BF16(CoAttentionForwardKernels, co_attention_forward)
// Gradients keep the products of values: of pairs they would be rounded before they are summed.
DSNET_DISPATCH(CoAttentionBackwardKernels, co_attention_backward)

}  // namespace dsnet::cpu
