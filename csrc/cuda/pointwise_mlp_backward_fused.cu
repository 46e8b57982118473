#include "cuda/pointwise_mlp_backward_fused.cuh"

namespace dsnet::cuda {

void mlp_backward_fused(
    const MlpBackward& args, Storage storage, const MlpLaunch& l, CUstream_st* stream) {
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto fused =
          args.shape.channels > 64 ? launch_backward_fused<T, 128> : launch_backward_fused<T, 64>;
      fused(args, l, stream);
    }
  });
  const int64_t weights = args.shape.hidden * args.shape.channels;
  mlp_backward_sums(args, l, stream);
  sum_slots(args.fc1_partials, l.hidden_slots, weights, args.grad_fc1, stream);
  sum_slots(args.fc2_partials, l.hidden_slots, weights, args.grad_fc2, stream);
}

}  // namespace dsnet::cuda
