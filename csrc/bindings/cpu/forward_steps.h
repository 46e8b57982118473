// The steps of operations' forward passes behind the packing of their parameters.
#pragma once

#include "bindings/cpu/workspace.h"
#include "cpu/co_attention.h"
#include "cpu/global_attention.h"
#include "cpu/patch_conv.h"
#include "cpu/upsample_concat.h"

namespace dsnet {

inline void run_attention(Workspace& space, const cpu::AttentionForwardKernels& kernels,
    cpu::AttentionForward& args, const cpu::AttentionLayout& layout) {
  const cpu::AttentionShape& shape = args.shape;
  const int64_t M = shape.tokens, d = shape.head_dim, all_heads = shape.batch * shape.heads;
  const int64_t projection = 3 * d * shape.width(), size = layout.scratch(shape);
  if (layout.is_few) {
    space.run(kernels.few, args, size, all_heads, M * (projection + 2 * M * d));
    return;
  }
  args.qkv = space.held({all_heads, M, layout.head});
  args.keys = space.held({all_heads, d, layout.keys});
  space.run(kernels.project, args, size, shape.batch * layout.token_blocks,
      shape.heads * projection * cpu::AttentionLayout::token_block);
  space.run(kernels.attend, args, size, all_heads * layout.query_blocks,
      2 * M * d * cpu::AttentionLayout::query_block);
}

inline void run_co_attention(Workspace& space, const cpu::CoAttentionForwardKernels& kernels,
    cpu::CoAttentionForward& args) {
  const cpu::CoAttentionShape& shape = args.shape;
  const cpu::CoAttentionLayout& layout = args.layout;
  args.met = space.held({shape.batch, shape.heads, layout.met});
  args.partials = space.held({shape.batch, layout.chunks, shape.heads, layout.partial});
  const int64_t size = cpu::scratch_of(shape, layout, false);
  space.run(
      kernels.prologue, args, size, shape.batch * shape.heads, layout.prologue_products(shape));
  space.run(kernels.local, args, size, shape.batch * layout.chunks, layout.local_products(shape));
  space.run(
      kernels.finish, args, size, shape.batch * layout.row_blocks, layout.finish_products(shape));
}

inline void run_patch_conv(
    Workspace& space, const cpu::PatchConvKernels& kernels, cpu::PatchConv& args) {
  const int64_t tokens = args.shape.tokens(), depth = args.shape.depth();
  if (args.gathers_first()) {
    args.gathered = space.held({tokens, args.row()});
    space.run(kernels.gather, args, args.row(), tokens, 4 * depth);
  }
  const cpu::ProductTasks tasks = args.tasks();
  space.run(kernels.run, args, args.scratch(), tasks.count(),
      tasks.block * depth * (args.shape.outputs / tasks.groups + cpu::lanes));
}

inline void run_upsample_concat(
    Workspace& space, const cpu::UpsampleForwardKernels& kernels, cpu::UpsampleForward& args) {
  const cpu::UpsampleShape& shape = args.shape;
  const cpu::UpsampleLayout layout(shape);
  args.mixed = space.held({shape.global_tokens(), layout.channels});
  const int64_t size = layout.scratch(shape), C = shape.channels;
  const cpu::ProductTasks global = layout.global_tasks(shape);
  space.run(kernels.mix_global, args, size, global.count(),
      global.block * shape.global_channels * C / global.groups);
  space.run(kernels.mix, args, size, shape.rows(), shape.width * C * (shape.local_channels + 16));
}

}  // namespace dsnet
