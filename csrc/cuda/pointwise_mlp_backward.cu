#include "cuda/pointwise_mlp_backward.cuh"

namespace dsnet::cuda {

void mlp_backward_hidden(const MlpBackward& args, Storage storage, const MlpLaunch& l,
    const MlpSlab& slab, CUstream_st* stream) {
  with_storage(storage, [&](auto zero) { launch_hidden<decltype(zero)>(args, l, slab, stream); });
}

void mlp_backward_tokens(const MlpBackward& args, Storage storage, const MlpLaunch& l,
    const MlpSlab& slab, CUstream_st* stream) {
  const int64_t channels = args.shape.channels;
  const int64_t blocks = divide_up(slab.tokens, MlpLaunch::channel_rows) *
                         divide_up(channels, MlpLaunch::channel_columns);
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    const TokenGradient<T> gradient{rows_of<T>(args.grad, slab, channels),
        dense<T>(args.grad_normalized, slab.tokens, channels),
        rows_of<T>(args.x, slab, channels).data, args.scale,
        Factors{args.branch_scale, args.shape.pixels}, slab.first,
        static_cast<T*>(args.grad_x) + slab.first * channels,
        args.channel_partials + slab.first / MlpLaunch::channel_rows * channels,
        l.channel_slots * channels};
    launch("pointwise_mlp_backward_tokens", pointwise_mlp_backward_tokens<T>,
        {dim3{static_cast<unsigned>(blocks)}, dim3{MlpLaunch::threads}}, stream, gradient,
        l.packed);
  });
}

void mlp_backward_sums(const MlpBackward& args, const MlpLaunch& l, CUstream_st* stream) {
  const int64_t channels = args.shape.channels;
  sum_slots(args.hidden_partials, l.hidden_slots, args.shape.hidden, args.grad_fc1_bias, stream);
  const float* partials = args.channel_partials;
  for (float* sum : {args.grad_fc2_bias, args.grad_scale, args.grad_shift}) {
    sum_slots(partials, l.channel_slots, channels, sum, stream);
    partials += l.channel_slots * channels;
  }
}

void mlp_backward_weight(
    const float* partials, int64_t slabs, int64_t values, float* sum, CUstream_st* stream) {
  sum_slots(partials, slabs, values, sum, stream);
}

}  // namespace dsnet::cuda
