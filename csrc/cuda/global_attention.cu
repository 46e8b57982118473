#include "cuda/global_attention.cuh"

namespace dsnet::cuda {

DSNET_ATTENTION_PROJECTION(, float);
DSNET_ATTENTION_PROJECTION(, __nv_bfloat16);
DSNET_ATTENTION_PROJECTION(, __half);

void attention_forward(
    const AttentionForward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream) {
  if (l.attention_blocks() == 0) return;
  const dim3 blocks{static_cast<unsigned>(l.attention_blocks())};
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    if (l.fused) {
      const auto threads = static_cast<unsigned>(l.fused_threads);
      // Later Q, K and V take the same room, and never more.
      const Grid grid{blocks, dim3{threads}, projection_bytes<96>(l.fused_threads / 2)};
      launch("global_attention_fused", global_attention_fused<T>, grid, stream, args, l);
      return;
    }
    launch_projection<T>(args.shape, args.inputs, l, args.qkv, nullptr, nullptr, stream);
    with_head_tile(l.head_tile, [&](auto head_tile) {
      constexpr int tile = decltype(head_tile)::value;
      launch("global_attention_forward", global_attention_forward<T, tile>,
          {blocks, dim3{128}, attention_bytes<T, tile>(1, 2, tile_rows<T, tile>)}, stream, args, l);
    });
  });
}

}  // namespace dsnet::cuda
