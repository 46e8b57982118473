// Upsampling, concatenation and 1×1 mixing on the GPU: forward. To be included by one translation
// unit.
//
// With W = [W_l, W_g], W·concat[local, up(global)] = local·W_lᵀ + up(global·W_gᵀ): one kernel mixes
// the global stream on its own grid, in float32; another mixes the local stream and samples the
// first one's result where it writes its own.
#pragma once

#include "cuda/upsample_concat_tiles.cuh"

namespace dsnet::cuda {

// W_l or W_g: columns of (C, Cl + Cg).
template <typename T>
DSNET_ANYWHERE Matrix<T> local_weight(const UpsampleShape& shape, const void* weight) {
  return {
      static_cast<const T*>(weight), shape.channels, shape.local_channels, shape.weight_columns};
}
template <typename T>
DSNET_ANYWHERE Matrix<T> global_weight(const UpsampleShape& shape, const void* weight) {
  return {static_cast<const T*>(weight) + shape.local_channels, shape.channels,
      shape.global_channels, shape.weight_columns};
}

// mixed = global · W_gᵀ.
template <typename T>
__global__ void __launch_bounds__(UpsampleLaunch::threads, product_blocks)
    upsample_concat_mix(const UpsampleForward args, const UpsampleLaunch l) {
  const UpsampleShape& shape = args.shape;
  const ProductPlace place(l.mixed_blocks);
  const int64_t rows = shape.batch * shape.cells, channels = shape.channels;
  float result[UpsampleLaunch::block_columns / 8][4] = {};
  RowProduct<T, T, true>::compute(dense<T>(args.global, rows, shape.global_channels),
      global_weight<T>(shape, args.weight), place, l.packed, result);
  for_each_eight(result, [&](int block_row, int block_column, const float (&values)[8]) {
    const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
    const int count = row < rows ? part_of_eight(column, channels) : 0;
    if (count > 0) store_eight(args.mixed + row * channels + column, count, l.packed, values);
  });
}

// What the four cells around a pixel add to eight channels.
class Sampler {
 public:
  DSNET_DEVICE Sampler(const UpsampleForward& args, int64_t row)
      : args_(args),
        image_(row / args.shape.pixels),
        pixel_(row % args.shape.pixels),
        y_(Axis(args.shape.height, args.shape.global_height),
            static_cast<int>(pixel_ / args.shape.width)),
        x_(Axis(args.shape.width, args.shape.global_width),
            static_cast<int>(pixel_ % args.shape.width)) {}

  DSNET_DEVICE void sample(int64_t column, int count, bool packed, float (&out)[8]) const {
    float above[8], below[8];
    sample_row(y_.low, column, count, packed, above);
    sample_row(y_.high, column, count, packed, below);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmaf(y_.low_weight, above[i], y_.high_weight * below[i]);
  }

 private:
  DSNET_DEVICE void sample_row(
      int row, int64_t column, int count, bool packed, float (&out)[8]) const {
    const UpsampleShape& shape = args_.shape;
    const float* cells =
        args_.mixed + column + (image_ * shape.cells + row * shape.global_width) * shape.channels;
    float left[8], right[8];
    load_eight(cells + x_.low * shape.channels, count, packed, left);
    load_eight(cells + x_.high * shape.channels, count, packed, right);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmaf(x_.low_weight, left[i], x_.high_weight * right[i]);
  }

  const UpsampleForward& args_;
  int64_t image_, pixel_;
  Sample y_, x_;
};

// out = residual + branch_scale · (local · W_lᵀ + up(mixed) + bias).
template <typename T>
__global__ void __launch_bounds__(UpsampleLaunch::threads, sampling_blocks)
    upsample_concat_forward(const UpsampleForward args, const UpsampleLaunch l) {
  const UpsampleShape& shape = args.shape;
  const ProductPlace place(l.mixed_blocks);
  const int64_t rows = shape.batch * shape.pixels, channels = shape.channels;
  float result[UpsampleLaunch::block_columns / 8][4] = {};
  RowProduct<T, T, true>::compute(dense<T>(args.local, rows, shape.local_channels),
      local_weight<T>(shape, args.weight), place, l.packed, result);

  const Factors factors{args.branch_scale, shape.pixels};
  for_each_eight(result, [&](int block_row, int block_column, const float (&mixed)[8]) {
    const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
    const int count = row < rows ? part_of_eight(column, channels) : 0;
    if (count == 0) return;
    const int64_t at = row * channels + column;
    const float factor = factors.at<T>(row);
    float values[8], bias[8], residual[8] = {};
    Sampler(args, row).sample(column, count, l.packed, values);
    load_parameter_eight<T>(args.bias, column, count, l.packed, 0, bias);
    if (args.residual != nullptr) {
      load_eight(static_cast<const T*>(args.residual) + at, count, l.packed, residual);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = fmaf(factor, mixed[i] + values[i] + bias[i], residual[i]);
    }
    store_eight(static_cast<T*>(args.out) + at, count, l.packed, values);
  });
}

}  // namespace dsnet::cuda
