// Global self-attention on the CPU: arguments, tasks and entry points. No torch here.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"
#include "token_product.h"

namespace dsnet::cpu {

struct AttentionShape {
  int64_t batch;
  int64_t tokens;  // M
  int64_t heads;
  int64_t head_dim;
  int64_t width() const { return heads * head_dim; }
};

// How matrices lie in memory and how a call is cut into tasks; from the shape alone.
struct AttentionLayout {
  // Up to here an image's heads are computed one after the other in a thread's own memory; beyond,
  // projection and attention are passes of their own over memory of the call.
  static constexpr int64_t few_tokens = 128;
  static constexpr int64_t token_block = 56;  // of a projection's task
  static constexpr int64_t query_block = 28;  // of an attention's task
  static constexpr int64_t key_block = 128;   // between two rescalings of the online softmax

  explicit AttentionLayout(const AttentionShape& shape)
      : width(padded(shape.width())),
        head(padded(3 * shape.head_dim)),
        dim(padded(shape.head_dim)),
        keys(padded(shape.tokens)),
        token_blocks((shape.tokens + token_block - 1) / token_block),
        query_blocks((shape.tokens + query_block - 1) / query_block),
        packed_head(head + shape.width() * head),
        packed(2 * width + shape.heads * packed_head),
        is_few(shape.tokens <= few_tokens) {}

  // Row strides, in whole registers.
  int64_t width;  // of tokens
  int64_t head;   // of one head's [Q, K, V]
  int64_t dim;    // of one head's output
  int64_t keys;   // of transposed keys
  int64_t token_blocks, query_blocks;
  // Norm weight and bias, which are all of it in the backward, then for each head the bias and the
  // weights of [Q, K, V], transposed, in panels of a tile's columns.
  int64_t packed_head, packed;
  bool is_few;

  int64_t scratch(const AttentionShape& shape) const {
    const int64_t scores = query_block * (key_block + 2 * dim + 3 * lanes);
    if (!is_few) return scores + token_block * width;
    return scores + shape.tokens * (width + head) + shape.head_dim * keys;
  }
};

// The same for the backward alone.
struct AttentionBackwardLayout {
  static constexpr int64_t token_block = 112;  // of B · M
  static constexpr int64_t panel = 48;         // a multiple of any tile's columns

  AttentionBackwardLayout() = default;
  AttentionBackwardLayout(const AttentionShape& shape, const AttentionLayout& layout) {
    // Scores and their gradients stay in the second-level cache.
    query_block = shape.tokens <= AttentionLayout::few_tokens ? 56 : layout.keys <= 1152 ? 28 : 7;
    const int64_t blocks = (shape.tokens + query_block - 1) / query_block;
    // Several only where there are fewer heads than a processor has cores.
    const int64_t wanted = (8 + shape.batch * shape.heads - 1) / (shape.batch * shape.heads);
    splits = shape.tokens <= AttentionLayout::few_tokens ? 1 : wanted < blocks ? wanted : blocks;
    split_blocks = (blocks + splits - 1) / splits;
    splits = (blocks + split_blocks - 1) / split_blocks;
    token_blocks = (shape.batch * shape.tokens + token_block - 1) / token_block;
    panels = (layout.width + panel - 1) / panel;
  }

  int64_t query_block;   // of one head, handled together
  int64_t splits;        // tasks of one head, each with its own sums for K and V
  int64_t split_blocks;  // query blocks of a split
  int64_t token_blocks, panels;

  int64_t scratch(const AttentionShape& shape, const AttentionLayout& layout) const {
    const int64_t rows = query_block, M = shape.tokens;
    int64_t heads =
        (2 * layout.keys + 3 * layout.dim + 2 * lanes) * rows + 3 * M * layout.dim + layout.keys;
    if (layout.is_few) heads += 2 * shape.head_dim * layout.keys;
    const int64_t tokens = (token_block + 2) * layout.width;
    return heads > tokens ? heads : tokens;
  }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct AttentionCall {
  AttentionShape shape;
  const void* x;  // (B, M, C) as stored
  Parameter norm_weight, norm_bias, qkv_weight;
  double eps;
  AttentionDropout dropout;
  void* packed;  // see AttentionLayout
  // With many tokens:
  void* keys;  // (B, h, d, layout.keys)
};

struct AttentionForward : AttentionCall {
  Parameter qkv_bias;
  void* out;   // (B, M, C) as stored
  void* lse;   // (B, h, M)
  void* kept;  // (B, h, M, layout.head): [Q, K, V] for the backward; may be null
  // With many tokens:
  void* qkv;  // likewise
};

struct AttentionBackward : AttentionCall {
  AttentionBackwardLayout cut;
  const void* grad;     // (B, M, C) as stored
  const void* lse;      // (B, h, M)
  const void* qkv;      // (B, h, M, layout.head): what the forward kept
  void* y;              // (B, M, layout.width), the normalised tokens
  void* moments;        // (B, M, 2): mean, 1 / √(variance + eps)
  void* packed_rows;    // (3·C, layout.width) in panels of a tile's columns: the weights
  void* grad_qkv;       // (B, M, 3·C), columns as the weight's rows
  void* partials;       // (B, h, splits, 2, M, d) of K and V, where there are several splits
  void* norm_partials;  // (token_blocks, 2, layout.width) of weight and bias
  void* grad_x;         // (B, M, C) as stored
  // With many tokens:
  void* values;  // (B, h, d, layout.keys)
};

struct AttentionForwardKernels {
  Step<AttentionForward> pack;     // h + 1 tasks
  Step<AttentionForward> few;      // B · h tasks: everything else
  Step<AttentionForward> project;  // B · token_blocks tasks
  Step<AttentionForward> attend;   // B · h · query_blocks tasks
};

struct AttentionBackwardKernels {
  Step<AttentionBackward> pack;       // panels + 1 tasks
  Step<AttentionBackward> normalise;  // B · token_blocks tasks
  Step<AttentionBackward> heads;      // B · h · splits tasks: gradients of Q, K and V
  Step<AttentionBackward> tokens;     // cut.token_blocks tasks: of x and the norm
  Step<TokenProduct> weights;         // of weight and bias
};

AttentionForwardKernels global_attention_forward(Capability capability, Storage storage);
AttentionBackwardKernels global_attention_backward(Capability capability, Storage storage);

}  // namespace dsnet::cpu
