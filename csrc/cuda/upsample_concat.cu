#include "cuda/upsample_concat.cuh"

namespace dsnet::cuda {

void upsample_forward(
    const UpsampleForward& args, Storage storage, const UpsampleLaunch& l, CUstream_st* stream) {
  const auto blocks = [](int64_t rows, int64_t columns) {
    return dim3{static_cast<unsigned>(rows * columns)};
  };
  with_storage(storage, [&](auto zero) {
    using T = decltype(zero);
    constexpr size_t bytes = RowProduct<T, T, true>::bytes;
    launch("upsample_concat_mix", upsample_concat_mix<T>,
        {blocks(l.cell_blocks, l.mixed_blocks), dim3{UpsampleLaunch::threads}, bytes}, stream, args,
        l);
    launch("upsample_concat_forward", upsample_concat_forward<T>,
        {blocks(l.pixel_blocks, l.mixed_blocks), dim3{UpsampleLaunch::threads}, bytes}, stream,
        args, l);
  });
}

}  // namespace dsnet::cuda
