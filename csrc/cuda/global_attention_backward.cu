#include "cuda/global_attention_backward.cuh"

namespace dsnet::cuda {

void column_sums(Storage storage, const ColumnSums& sums, cudaStream_t stream) {
  const int64_t groups = (sums.columns + NormBackward::columns - 1) / NormBackward::columns;
  const Grid grid{dim3{static_cast<unsigned>(groups * sums.slots)},
      dim3{NormBackward::columns, NormBackward::row_lanes}};
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    launch("global_attention_column_sums", global_attention_column_sums<T>, grid, stream,
        static_cast<const T*>(sums.matrix), static_cast<const T*>(sums.x), sums.statistics,
        sums.rows, sums.columns, sums.slot_rows, sums.partials);
  });
}

void attention_backward_scores(
    const AttentionBackward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream) {
  if (l.attention_blocks() == 0) return;
  const int64_t width = args.shape.width;
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    launch_projection<T>(
        args.shape, args.inputs, l, args.qkv, args.normalized, args.statistics, stream);
    with_head_tile(l.head_tile, [&](auto head_tile) {
      constexpr int tile = decltype(head_tile)::value;
      constexpr int stages = backward_stages<T>;
      const dim3 blocks{static_cast<unsigned>(l.attention_blocks())};
      launch("global_attention_backward_queries", global_attention_backward_queries<T, tile>,
          {blocks, dim3{128}, attention_bytes<T, tile>(2, stages, tile_rows<T, tile>)}, stream,
          args, l);
      launch("global_attention_backward_keys", global_attention_backward_keys<T, tile>,
          {dim3{blocks.x * key_parts<tile>}, dim3{128},
              attention_bytes<T, tile>(2, stages, query_rows<T, tile>) +
                  QueryTiles<T, tile>::vector_bytes},
          stream, args, l);
    });
  });
  column_sums(storage,
      {args.grad_qkv, nullptr, nullptr, args.shape.batch * args.shape.tokens, 3 * width, l.slots,
          l.slot_rows, args.partials},
      stream);
  sum_slots(args.partials, l.slots, 3 * width, args.grad_qkv_bias, stream);
}

void attention_backward_norm(
    const AttentionBackward& args, Storage storage, const AttentionLaunch& l, CUstream_st* stream) {
  if (l.attention_blocks() == 0) return;
  const int64_t rows = args.shape.batch * args.shape.tokens;
  const auto blocks = static_cast<unsigned>((rows + NormBackward::rows - 1) / NormBackward::rows);
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    launch("global_attention_backward_norm", global_attention_backward_norm<T>,
        {dim3{blocks}, dim3{8 * NormBackward::rows}}, stream, args, l);
  });
  const int64_t width = args.shape.width;
  column_sums(storage,
      {args.grad_normalized, args.inputs.x, static_cast<const float*>(args.statistics), rows, width,
          l.slots, l.slot_rows, args.partials},
      stream);
  sum_slots(args.partials, l.slots, width, args.grad_norm_weight, stream);
  sum_slots(args.partials + l.slots * width, l.slots, width, args.grad_norm_bias, stream);
}

}  // namespace dsnet::cuda
