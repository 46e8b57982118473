// The global side of co-attention's backward, before and after its pass over the local tokens.
#pragma once

#include "co_attention_steps.h"
#include "token_product_steps.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// The matrices that local tokens meet, in order.
enum Met { met_keys, met_queries, met_grad, met_values };

// A chunk's gradients of one head.
template <typename T>
AccumulatorOf<T>* partial_of(const CoCall<T>& call, const CoAttentionBackward& args, int64_t image,
    int64_t chunk, int64_t h) {
  const int64_t index = (image * call.layout.chunks + chunk) * call.shape.heads + h;
  return static_cast<AccumulatorOf<T>*>(args.partials) + index * call.layout.grad_partial;
}

template <typename T>
void prologue(const CoAttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t M = shape.global_tokens, Cg = shape.global_width, d = shape.head_dim;
  const int64_t dim = shape.dim(), inner = layout.inner;
  Scratch<Acc> scratch(memory);
  Acc* grad = scratch.take(M * layout.global);
  Acc* qkv = scratch.take(M * layout.head);
  Acc* grad_heads = scratch.take(M * layout.dim);
  int64_t prepared = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / shape.heads, h = task % shape.heads;
    if (image != prepared) {
      const T* from = static_cast<const T*>(args.grad_global) + call.global_offset(image, 0);
      for (int64_t m = 0; m < M; ++m) {
        for_each_register<V>(Cg, [&](int64_t c, int64_t n) {
          load_part<V>(from + m * Cg + c, n).store(grad + m * layout.global + c);
        });
      }
      prepared = image;
    }
    if (h == 0) {
      Acc* y = static_cast<Acc*>(args.y) + image * M * layout.global;
      normalise_rows<V>(call.global(image, 0), M, Cg, layout.global, static_cast<Acc>(args.eps),
          call.norm_weight(), call.norm_bias(), y,
          static_cast<Moments<Acc>*>(args.moments) + image * M);
      as_left<T>(M, layout.global, y);
    }
    for (int64_t part = 0; part < 3; ++part) {
      const Acc* kept =
          static_cast<const Acc*>(args.global_qkv) + (image * M * 3 + part) * dim + h * d;
      copy_columns(M, d, kept, 3 * dim, qkv + part * d, layout.head);
    }
    meet(call, image, h, qkv, met_values);
    multiply_packed<V>(M, layout.dim, Cg, {grad, layout.global},
        call.matrix(h, layout.global_attended), {nullptr, 0}, {grad_heads, layout.dim});
    const int64_t offset = image * M * dim + h * d;
    copy_columns(M, d, grad_heads, layout.dim, static_cast<Acc*>(args.grad_attended) + offset, dim);
    const Acc* attended = static_cast<const Acc*>(args.attended) + offset;
    copy_columns(M, d, attended, dim, static_cast<Acc*>(args.attended_copy) + offset, dim);
    // Summed as the products with single tokens are: where one has all the weight both are equal.
    Acc* delta = static_cast<Acc*>(args.deltas) + task * layout.rows;
    for (int64_t m = 0; m < M; ++m) {
      V sum = V::zero();
      for (int64_t c = 0; c < d; ++c) {
        sum = fma(V::fill(grad_heads[m * layout.dim + c]), V::fill(attended[m * dim + c]), sum);
      }
      Acc lanes_of_sum[V::size];
      sum.store(lanes_of_sum);
      delta[m] = lanes_of_sum[0];
    }
    Acc* meeting = call.met(image, h, met_grad);
    if (layout.absorbed) {
      multiply_packed<V>(M, inner, d, {grad_heads, layout.dim}, call.matrix(h, layout.value),
          {nullptr, 0}, {meeting, inner});
    } else {
      copy_columns(M, inner, grad_heads, layout.dim, meeting, inner);
    }
  }
}

// Joins the chunks' gradients of one head, and leads them to the global Q, K and V.
template <typename T>
void heads(const CoAttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t M = shape.global_tokens, Cl = shape.local_width, d = shape.head_dim;
  const int64_t dim = shape.dim(), inner = layout.inner, matrices = layout.absorbed ? 4 : 3;
  const int64_t tokens = shape.batch * M;
  Scratch<Acc> scratch(memory);
  Acc* sums = scratch.take(M * inner);
  Acc* grads = scratch.take(M * layout.dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / shape.heads, h = task % shape.heads;
    const auto add_chunks = [&](int64_t offset, int64_t count, Acc* to) {
      for (int64_t c = 0; c < count; c += V::size) {
        V sum = V::load(partial_of(call, args, image, 0, h) + offset + c);
        for (int64_t chunk = 1; chunk < layout.chunks; ++chunk) {
          sum = sum + V::load(partial_of(call, args, image, chunk, h) + offset + c);
        }
        sum.store(to + c);
      }
    };
    Acc* row_sums = static_cast<Acc*>(args.row_sums);
    for (int64_t part = 0; part < 3; ++part) {
      add_chunks(matrices * M * inner + part * layout.rows, layout.rows, grads);
      Acc* to = row_sums + (part * shape.heads + h) * tokens + image * M;
      // A key bias adds the same to all of a query's logits: no gradient, but NaN stays.
      for (int64_t m = 0; m < M; ++m) to[m] = part == 1 ? Acc{0} * grads[m] : grads[m];
    }
    const Acc* grad_bias = row_sums + h * tokens + image * M;
    const Acc* query_bias = call.query_bias(h);
    for (int64_t part = 0; part < matrices; ++part) {
      Acc* to = sums;
      if (layout.absorbed) {
        to = static_cast<Acc*>(args.sums) + ((part * shape.heads + h) * tokens + image * M) * inner;
      }
      add_chunks(part * M * inner, M * inner, to);
      const bool is_values = part == matrices - 1;
      if (layout.absorbed && part == met_grad) continue;
      const Acc* from = to;
      if (layout.absorbed) {
        const PackedMatrix& matrix = is_values          ? layout.to_attended
                                     : part == met_keys ? layout.to_query
                                                        : layout.to_key;
        multiply_packed<V>(M, layout.dim, Cl, {to, inner}, call.matrix(h, matrix), {nullptr, 0},
            {grads, layout.dim});
        from = grads;
      }
      // Rows of the projection are Q, K and V.
      const int64_t column = (is_values ? 2 : part == met_keys ? 1 : 0) * dim + h * d;
      const Acc factor = is_values ? Acc{1} : call.scale;
      Acc* grad_qkv = static_cast<Acc*>(args.grad_global_qkv) + image * M * 3 * dim + column;
      for (int64_t m = 0; m < M; ++m) {
        const Acc bias = part == met_keys ? grad_bias[m] : Acc{0};
        for (int64_t c = 0; c < d; ++c) {
          grad_qkv[m * 3 * dim + c] = factor * (from[m * layout.dim + c] + bias * query_bias[c]);
        }
      }
    }
  }
}

// Gradients of a block of global tokens, and the block's share of those of the norm.
template <typename T>
void finish(const CoAttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const CoCall<T> call(args);
  const CoAttentionLayout& layout = call.layout;
  const CoAttentionShape& shape = args.shape;
  const int64_t M = shape.global_tokens, Cg = shape.global_width, dim = shape.dim();
  const int64_t block = layout.finish_rows;
  Scratch<Acc> scratch(memory);
  Acc* grad_y = scratch.take(block * layout.global);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / layout.row_blocks, first = task % layout.row_blocks * block;
    const int64_t rows = smaller(block, M - first), row = image * M + first;
    multiply_packed<V>(rows, layout.global, 3 * dim,
        {static_cast<const Acc*>(args.grad_global_qkv) + row * 3 * dim, 3 * dim},
        call.packed() + layout.global_rows.offset, {nullptr, 0}, {grad_y, layout.global});
    Acc* norm = static_cast<Acc*>(args.norm_partials) + task * 2 * layout.global;
    for (int64_t c = 0; c < 2 * layout.global; ++c) norm[c] = 0;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t offset = (row + m) * Cg;
      normalise_gradient<V>(static_cast<const T*>(args.global) + offset,
          static_cast<const T*>(args.grad_global) + offset, Cg,
          static_cast<const Moments<Acc>*>(args.moments)[row + m], call.norm_weight(),
          grad_y + m * layout.global, norm, norm + layout.global,
          static_cast<T*>(args.grad_global_in) + offset);
    }
  }
}

template <typename T>
void weights(const CoAttentionBackward& args, void* memory, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const TokenProduct* product = args.products;
    int64_t task = i * args.task_step % args.tasks;
    for (; task >= product->tasks(); ++product) task -= product->tasks();
    token_product<T>(*product, memory, task, task + 1);
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
