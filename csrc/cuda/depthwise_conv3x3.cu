#include "cuda/depthwise_conv3x3.cuh"

namespace dsnet::cuda {

void depthwise_forward(
    const DepthwiseForward& args, Storage storage, const DepthwiseLaunch& l, CUstream_st* stream) {
  if (args.shape.batch == 0) return;
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = l.pack == 1 ? depthwise_conv3x3_forward<T, 1>
                                    : depthwise_conv3x3_forward<T, 16 / sizeof(T)>;
    launch("depthwise_conv3x3_forward", kernel, depthwise_grid(l), stream, args, l);
  });
}

void depthwise_backward(
    const DepthwiseBackward& args, Storage storage, const DepthwiseLaunch& l, CUstream_st* stream) {
  const bool is_empty = args.shape.batch == 0;
  if (!is_empty) {
    with_storage(storage, [&](auto zero) {
      using T = decltype(zero);
      const auto kernel =
          l.pack == 1 ? depthwise_conv3x3_backward<T, 1> : depthwise_conv3x3_backward<T, 4>;
      launch("depthwise_conv3x3_backward", kernel, depthwise_grid(l), stream, args, l);
    });
  }
  const int64_t count = DepthwiseBackward::gradient_rows * args.shape.channels;
  sum_slots(args.partials, is_empty ? 0 : l.slots(), count, args.rows, stream);
}

}  // namespace dsnet::cuda
