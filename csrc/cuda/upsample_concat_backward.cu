#include "cuda/upsample_concat_backward.cuh"

namespace dsnet::cuda {

void upsample_backward(
    const UpsampleBackward& args, Storage storage, const UpsampleLaunch& l, CUstream_st* stream) {
  const UpsampleShape& shape = args.shape;
  const int64_t pixels = shape.batch * shape.pixels, cells = shape.batch * shape.cells;
  const int64_t channels = shape.channels, weight_values = channels * shape.weight_columns;
  float* bias_partials = args.partials + l.slots * weight_values;
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    launch_gather<T>(args, l, stream);
    const Factors factors{args.branch_scale, shape.pixels};
    const auto grad = dense<T>(args.grad, pixels, channels);
    const auto grad_mixed = dense<float>(args.grad_mixed, cells, channels);
    launch_rows(grad, local_weight<T>(shape, args.weight), factors, l.pixel_blocks, l.local_blocks,
        l.packed, args.grad_local, stream);
    launch_rows(grad_mixed, global_weight<T>(shape, args.weight), Factors{}, l.cell_blocks,
        l.global_blocks, l.packed, args.grad_global, stream);
    const WeightSums local{args.partials, nullptr, shape.weight_columns, l.pixels_of_slot,
        l.mixed_blocks, l.local_blocks};
    launch_weight(grad, dense<T>(args.local, pixels, shape.local_channels), factors, l.packed,
        l.slots, local, stream);
    const WeightSums global{args.partials + shape.local_channels, bias_partials,
        shape.weight_columns, l.cells_of_slot, l.mixed_blocks, l.global_blocks};
    launch_weight(grad_mixed, dense<T>(args.global, cells, shape.global_channels), Factors{},
        l.packed, l.slots, global, stream);
  });
  sum_slots(args.partials, l.slots, weight_values, args.grad_weight, stream);
  sum_slots(bias_partials, l.slots, channels, args.grad_bias, stream);
}

}  // namespace dsnet::cuda
