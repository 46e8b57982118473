// Bidirectional co-attention on the CPU: arguments, tasks and entry points. No torch here.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "capability.h"
#include "token_product.h"

namespace dsnet::cpu {

struct CoAttentionShape {
  int64_t batch;
  int64_t local_tokens;   // N
  int64_t global_tokens;  // M
  int64_t local_width;    // Cl
  int64_t global_width;   // Cg
  int64_t heads;
  int64_t head_dim;  // d
  int64_t dim() const { return heads * head_dim; }
};

// A weight rearranged as the right side of a product: depth × columns, in panels of a tile's
// columns.
struct PackedMatrix {
  int64_t offset = 0, depth = 0, columns = 0;
};

// How matrices lie in memory and how a call is cut into tasks; from the shape alone.
//
// Of every head and image, local tokens meet matrices of M rows. Absorbed, these have Cl columns
// and the local tokens are taken as they are; projected, they have d and local tokens are
// projected tile by tile.
struct CoAttentionLayout {
  static constexpr int64_t row_block = 112;    // global tokens that meet a tile at a time
  static constexpr int64_t finish_block = 56;  // global tokens of a task that follows, at most
  static constexpr int64_t most_tasks = 64;    // wanted of the pass over local tokens

  CoAttentionLayout() = default;
  CoAttentionLayout(const CoAttentionShape& shape, bool is_absorbed, bool is_backward)
      : absorbed(is_absorbed),
        local(padded(shape.local_width)),
        global(padded(shape.global_width)),
        dim(padded(shape.head_dim)),
        head(padded(3 * shape.head_dim)),
        rows(padded(shape.global_tokens)),
        inner(is_absorbed ? local : dim),
        depth(is_absorbed ? shape.local_width : shape.head_dim),
        tile(shape.global_tokens <= 256 ? 112 : 48) {
    const int64_t N = shape.local_tokens, M = shape.global_tokens;
    if (tile > padded(N)) tile = padded(N);
    const int64_t least = tile > 2 * M ? tile : 2 * M;
    const int64_t images = shape.batch > 0 ? shape.batch : 1;
    const int64_t wanted = (most_tasks + images - 1) / images;
    const int64_t possible = (N + least - 1) / least;
    chunks = wanted < possible ? wanted : possible;
    // Not all of a single image in one task.
    if (images * chunks == 1 && N >= 2 * lanes) {
      chunks = 2;
      tile = padded((N + 1) / 2);
    }
    chunk_tokens = ((N + chunks - 1) / chunks + tile - 1) / tile * tile;
    chunks = (N + chunk_tokens - 1) / chunk_tokens;
    row_blocks = (M + finish_block - 1) / finish_block;
    if (images * row_blocks == 1 && M > 1) row_blocks = 2;
    finish_rows = (M + row_blocks - 1) / row_blocks;
    describe_packed(shape, is_backward);
  }

  bool absorbed = false;
  // Row strides, in whole registers.
  int64_t local = 0, global = 0;            // of tokens
  int64_t dim = 0, head = 0;                // of one head's channels, and of its [Q, K, V]
  int64_t rows = 0;                         // of a number per global token
  int64_t inner = 0;                        // of a matrix that local tokens meet
  int64_t depth = 0;                        // its columns that count
  int64_t tile = 0;                         // local tokens handled together
  int64_t chunks = 0, chunk_tokens = 0;     // of an image's local tokens
  int64_t row_blocks = 0, finish_rows = 0;  // tasks that follow, and their global tokens

  // Vectors: norm weight and bias, bias of the global output; scale, shift, bias of the local one.
  int64_t vectors = 0;
  // Of one head: bias of its global [Q, K, V], of its local queries and values, then matrices.
  int64_t head_biases = 0, head_size = 0;
  PackedMatrix global_qkv, local_qkv;       // (Cg, 3·d), (Cl, 3·d)
  PackedMatrix query, key, value;           // (d, Cl)
  PackedMatrix to_query, to_key, to_value;  // (Cl, d)
  PackedMatrix proj;                        // (d, Cl)
  PackedMatrix to_attended;                 // (Cl, d), the local projection's gradient
  PackedMatrix global_attended;             // (Cg, d), the global projection's gradient
  PackedMatrix local_rows;                  // (3·d, Cl)
  // Of all heads, after the last one.
  PackedMatrix global_proj;  // (dim, Cg)
  PackedMatrix global_rows;  // (3·dim, Cg)
  int64_t packed = 0;        // everything

  // Matrices of a head that its local tokens meet, in order: keys, queries, in the backward what
  // the gradient of the attended meets, and values; then the bias of the scores.
  int64_t met_matrices = 0, met = 0;
  // A chunk's share of one head: maxima, sums, kept sums, what the queries have attended to.
  int64_t partial = 0;
  // The same of gradients: of keys, queries, attended (absorbed) and values; then row sums: of both
  // scores' gradients, and of the kept weights of global queries.
  int64_t grad_partial = 0;
  // What a forward keeps for its backward: [Q, K, V] of the global tokens, with a register more,
  // and of the local ones where they are projected.
  int64_t kept_global = 0, kept_local = 0;

  // Products of the steps' tasks, roughly.
  int64_t pack_products(const CoAttentionShape& shape) const {
    return 8 * shape.head_dim * (shape.local_width + shape.global_width);
  }
  int64_t prologue_products(const CoAttentionShape& shape) const {
    return 3 * shape.global_tokens * shape.head_dim * (shape.global_width + shape.local_width);
  }
  int64_t local_products(const CoAttentionShape& shape) const {
    const int64_t projections = absorbed ? 0 : 4 * shape.dim() * shape.local_width;
    return chunk_tokens * (4 * shape.heads * shape.global_tokens * depth + projections);
  }
  int64_t finish_products(const CoAttentionShape& shape) const {
    return finish_rows * shape.dim() * (shape.global_width + shape.local_width);
  }

 private:
  void describe_packed(const CoAttentionShape& shape, bool is_backward) {
    const int64_t Cl = shape.local_width, Cg = shape.global_width, d = shape.head_dim;
    const int64_t M = shape.global_tokens;
    vectors = 3 * global + 3 * local;
    head_biases = head + 2 * dim;
    int64_t next = head_biases;
    const auto add = [&](int64_t matrix_depth, int64_t columns) {
      const PackedMatrix matrix{next, matrix_depth, columns};
      next += padded(matrix_depth + matrix_depth % 2) * columns;
      return matrix;
    };
    if (!is_backward) global_qkv = add(Cg, head);
    if (absorbed) {
      query = add(d, local);
      key = add(d, local);
      to_value = add(Cl, dim);
    } else if (!is_backward) {
      local_qkv = add(Cl, head);
    }
    if (absorbed || !is_backward) proj = add(d, local);
    if (is_backward) {
      to_attended = add(Cl, dim);
      global_attended = add(Cg, dim);
      if (absorbed) {
        value = add(d, local);
        to_query = add(Cl, dim);
        to_key = add(Cl, dim);
      } else {
        local_rows = add(3 * d, local);
      }
    }
    head_size = next;
    next = vectors + shape.heads * head_size;
    if (is_backward) {
      global_rows = add(3 * shape.dim(), global);
    } else {
      global_proj = add(shape.dim(), global);
    }
    packed = next;

    met_matrices = is_backward ? 4 : 3;
    met = met_matrices * M * inner + rows;
    partial = 3 * rows + M * inner;
    grad_partial = (absorbed ? 4 : 3) * M * inner + 3 * rows;
    kept_global = shape.batch * M * 3 * shape.dim() + lanes;
    kept_local = absorbed ? 0 : shape.batch * shape.heads * shape.local_tokens * head;
  }
};

// All memory in accumulators, aligned to 64 bytes, unless it says otherwise.
struct CoAttentionCall {
  CoAttentionShape shape;
  CoAttentionLayout layout;
  const void* local;   // (B, N, Cl) as stored
  const void* global;  // (B, M, Cg) as stored
  Parameter norm_weight, norm_bias, local_qkv_weight, local_qkv_bias, global_qkv_weight;
  Parameter global_qkv_bias, local_proj_weight, local_proj_bias, global_proj_weight;
  Parameter global_proj_bias, local_scale, local_shift;  // the last two may have no data
  double eps;
  AttentionDropout dropout;
  void* packed;          // layout.packed
  void* met;             // (B, h, layout.met)
  void* local_softmax;   // (B, h, N, 2); read by the backward
  void* global_softmax;  // (B, h, M, 2)
  void* attended;        // (B, M, dim)
  // What a forward keeps, if they are not null, and its backward reads:
  void* global_qkv;  // (B, M, 3·dim), and a register
  void* local_qkv;   // (B, h, N, layout.head), projected
};

struct CoAttentionForward : CoAttentionCall {
  void* partials;    // (B, chunks, h, layout.partial)
  void* local_out;   // (B, N, Cl) as stored
  void* global_out;  // (B, M, Cg) as stored
};

struct CoAttentionBackward : CoAttentionCall {
  const void* grad_local;   // (B, N, Cl) as stored
  const void* grad_global;  // (B, M, Cg) as stored
  void* y;                  // (B, M, layout.global), the normalised global tokens
  void* moments;            // (B, M, 2)
  void* grad_attended;      // (B, M, dim), a register more, as the next
  void* attended_copy;      // (B, M, dim)
  void* deltas;             // (B, h, layout.rows): Σ of gradient times attended
  void* partials;           // (B, chunks, h, layout.grad_partial)
  void* sums;               // (4, h, B · M, layout.inner), as in a partial; absorbed
  void* row_sums;           // (3, h, B · M), as in a partial
  void* grad_global_qkv;    // (B, M, 3·dim)
  void* channel_partials;   // (B, chunks, 3, layout.local): of scale, shift, output bias
  void* norm_partials;      // (B, row_blocks, 2, layout.global): of weight and bias
  // Projected:
  void* tokens;          // (B, N, layout.local), local tokens after the affine
  void* grad_local_qkv;  // (B, N, 3·dim)
  void* heads_out;       // (B, N, dim) and a register: what local queries attended to
  // Tasks of all products follow one another, taken in steps, coprime to their number: those of one
  // product are longer than another's, and a thread takes neighbours.
  const TokenProduct* products;
  int64_t tasks, task_step;
  void* grad_local_in;   // (B, N, Cl) as stored
  void* grad_global_in;  // (B, M, Cg) as stored
};

struct CoAttentionForwardKernels {
  Step<CoAttentionForward> pack;      // h + 1 tasks
  Step<CoAttentionForward> prologue;  // B · h tasks: what local tokens meet
  Step<CoAttentionForward> local;     // B · chunks tasks
  Step<CoAttentionForward> finish;    // B · row_blocks tasks: the global stream
};

struct CoAttentionBackwardKernels {
  Step<CoAttentionBackward> pack;      // h + 1 tasks
  Step<CoAttentionBackward> prologue;  // B · h tasks
  Step<CoAttentionBackward> local;     // B · chunks tasks
  Step<CoAttentionBackward> heads;     // B · h tasks: gradients of global Q, K, V
  Step<CoAttentionBackward> finish;    // B · row_blocks tasks: of the global stream
  Step<CoAttentionBackward> weights;   // args.tasks tasks
};

int64_t scratch_of(const CoAttentionShape& shape, const CoAttentionLayout& layout, bool backward);

CoAttentionForwardKernels co_attention_forward(Capability capability, Storage storage);
CoAttentionBackwardKernels co_attention_backward(Capability capability, Storage storage);

}  // namespace dsnet::cpu
