// What co-attention does to single tokens, before and after the attention: LayerNorm, affine,
// linear maps on the tensor cores, and small products in float32.
#pragma once

#include "cuda/co_attention.h"
#include "cuda/global_attention_tiles.cuh"

namespace dsnet::cuda {

// Mean and 1 / deviation of rows, (rows, 2), and their LayerNorm. A warp has a row.
template <typename T>
__global__ void __launch_bounds__(128) co_attention_norm(const T* x, Parameter weight,
    Parameter bias, float eps, int64_t rows, int width, T* normalized, float* statistics) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = lane_id();
  x += row * width;
  float sum = 0, squares = 0;
  for (int i = lane; i < width; i += 32) sum += widen(load_global<T>(x + i));
  const float mean = warp_sum(sum) / static_cast<float>(width);
  for (int i = lane; i < width; i += 32) {
    const float difference = widen(load_global<T>(x + i)) - mean;
    squares = fmaf(difference, difference, squares);
  }
  const float inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
  for (int i = lane; i < width; i += 32) {
    const float unit = (widen(load_global<T>(x + i)) - mean) * inverse;
    const float value = fmaf(unit, parameter_at<T>(weight, i, 1), parameter_at<T>(bias, i, 0));
    store_global(normalized + row * width + i, narrow(value, T{}));
  }
  if (lane == 0) store_global(statistics + 2 * row, Pack<float, 2>{{mean, inverse}});
}

// Rows of `width` channels, zero in the channels behind, up to `padded`.
template <typename T>
__global__ void __launch_bounds__(256)
    co_attention_pad(const T* x, int64_t rows, int width, int padded, bool packed, T* out) {
  constexpr int group = 16 / sizeof(T);
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int64_t row = i / (padded / group);
  const int column = static_cast<int>(i % (padded / group)) * group;
  if (row >= rows) return;
  float values[group] = {};
  const T* from = x + row * width + column;
  if (packed) {
    load_values(from, true, values);
  } else {
#pragma unroll
    for (int k = 0; k < group; ++k) {
      if (column + k < width) values[k] = widen(load_global<T>(from + k));
    }
  }
  store_global(out + row * padded + column, narrow<T>(values));
}

// The projections of scale·x + shift as those of x: W·diag(scale) in V, and b + W·shift. A warp
// has a row of W.
template <typename T, typename V>
__global__ void __launch_bounds__(128)
    co_attention_fold(const Parameter weight, const Parameter bias, const Parameter scale,
        const Parameter shift, int64_t rows, int width, V* folded, float* folded_bias) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = lane_id();
  float sum = 0;
  for (int i = lane; i < width; i += 32) {
    const float value = parameter_at<T>(weight, row * width + i, 0);
    sum = fmaf(value, parameter_at<T>(shift, i, 0), sum);
    store_global(folded + row * width + i, narrow(value * parameter_at<T>(scale, i, 1), V{}));
  }
  sum = warp_sum(sum);
  if (lane == 0) store_global(folded_bias + row, sum + parameter_at<T>(bias, row, 0));
}

// out = x·Wᵀ + bias + residual over rows.
struct Linear {
  Parameter x;  // (rows, depth), rows x_stride apart
  int64_t x_stride;
  Parameter weight;  // value (column, k) is weight_column·column + weight_depth·k from the first
  int64_t weight_column, weight_depth;
  Parameter bias;        // (columns) or null
  const void* residual;  // (rows, columns) or null
  void* out;             // (rows, columns)
  bool out_is_float32;
  int64_t rows;
  int depth, columns;
};

inline constexpr int linear_rows = 64, linear_columns = 64;

// 16 bytes to shared memory of `left` values `step` apart, zero behind them; lands at a
// wait_copies.
template <typename T>
DSNET_DEVICE void copy_values(
    T* shared, const Parameter& source, int64_t at, int64_t step, int left, bool packed) {
  constexpr int width = 16 / sizeof(T);
  if (packed) {
    const T* data = static_cast<const T*>(source.data);
    copy_async<16>(shared, left > 0 ? data + at : data, left > 0 ? 16 : 0);
    return;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float value = i < left ? parameter_at<T>(source, at + i * step, 0) : 0.0f;
    store_shared(shared + i, narrow(value, T{}));
  }
}

template <typename T>
__global__ void __launch_bounds__(128, 4)
    co_attention_linear(const Linear args, bool x_packed, bool weight_packed, bool out_packed) {
  constexpr int width = 16 / sizeof(T), chunk = 128 / sizeof(T), stride = row_stride<T, chunk>;
  const auto column_blocks =
      static_cast<unsigned>((args.columns + linear_columns - 1) / linear_columns);
  const int first_column = static_cast<int>(blockIdx.x % column_blocks) * linear_columns;
  const int64_t first_row = int64_t{blockIdx.x / column_blocks} * linear_rows;
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  T* shared = dynamic_shared<T>();
  constexpr int stage_values = (linear_rows + linear_columns) * stride;

  const auto copy = [&](int i, int stage) {
    for (int unit = static_cast<int>(threadIdx.x); unit < (linear_rows + linear_columns) * 8;
        unit += static_cast<int>(blockDim.x)) {
      const int line = unit / 8, k = i * chunk + unit % 8 * width;
      T* to = shared + stage * stage_values + line * stride + unit % 8 * width;
      if (line < linear_rows) {
        const int64_t row = first_row + line;
        const int left = row < args.rows ? args.depth - k : 0;
        copy_values(to, args.x, row * args.x_stride + k, 1, left, x_packed);
      } else {
        const int column = first_column + line - linear_rows;
        const int left = column < args.columns ? args.depth - k : 0;
        copy_values(to, args.weight, column * args.weight_column + k * args.weight_depth,
            args.weight_depth, left, weight_packed);
      }
    }
  };
  float result[linear_columns / 8][4] = {};
  for_each_tile<2>((args.depth + chunk - 1) / chunk, copy, [&](int, int stage) {
    const T* rows = shared + stage * stage_values;
    multiply_transposed<T, chunk>(LeftRows<T, chunk>(rows + warp_row * stride),
        rows + linear_rows * stride, linear_columns / 8, result);
  });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + warp_row + lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < linear_columns / 32; ++group) {
      float values[8];
      gather_row(result, 4 * group, half, values);
      const int column = first_column + 32 * group + lane % 4 * 8;
      const int left = row < args.rows ? args.columns - column : 0;
      const int64_t at = row * args.columns + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) values[i] += parameter_at<T>(args.bias, column + i, 0);
      }
      if (args.residual != nullptr) {
        add_eight(static_cast<const T*>(args.residual) + at, left, out_packed, values);
      }
      if (args.out_is_float32) {
        store_eight(static_cast<float*>(args.out) + at, left, out_packed, values);
      } else {
        store_eight(static_cast<T*>(args.out) + at, left, out_packed, values);
      }
    }
  }
}

template <typename T>
void launch_linear(const Linear& args, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const auto is_packed = [](const Parameter& p, int64_t stride, int64_t step, int depth) {
    return p.is_float32 == (sizeof(T) == 4) && step == 1 && stride % width == 0 &&
           depth % width == 0 && detail::is_attention_aligned(p.data);
  };
  const int64_t columns = divide_up(args.columns, linear_columns);
  const int64_t blocks = divide_up(args.rows, linear_rows) * columns;
  constexpr int stride = row_stride<T, 128 / static_cast<int>(sizeof(T))>;
  const Grid grid{dim3{static_cast<unsigned>(blocks)}, dim3{128},
      2 * (linear_rows + linear_columns) * stride * sizeof(T)};
  launch("co_attention_linear", co_attention_linear<T>, grid, stream, args,
      is_packed(args.x, args.x_stride, 1, args.depth),
      is_packed(args.weight, args.weight_column, args.weight_depth, args.depth),
      args.columns % 8 == 0 && detail::all_aligned({args.residual, args.out}));
}

// out = factor·(x·Y + row⊗bias) for each image and head, in float32.
struct SmallProduct {
  const float* x;  // value (row, k) is x_row·row + k from the first of image and head
  int64_t x_image, x_head, x_row;
  Parameter y;  // value (k, column) is y_first + y_head·head + y_depth·k + y_column·column
  int64_t y_first, y_head, y_depth, y_column;
  const float* row;  // (h, B, rows) or null
  Parameter bias;    // value (column) is bias_first + bias_head·head + column
  int64_t bias_first, bias_head;
  float factor;
  void* out;
  bool out_is_float32;
  int64_t out_image, out_head, out_row;
  int depth, columns, out_columns;  // of out, those behind `columns` are zero
};

inline constexpr int product_tile = 32;

// A tile of 32×32 for 256 threads.
template <typename T>
__global__ void __launch_bounds__(256)
    co_attention_small_product(const SmallProduct args, int64_t batch, int heads, int rows) {
  constexpr int tile = product_tile, stride = tile + 1;
  __shared__ SharedArray<float, tile * stride> x_storage;
  __shared__ SharedArray<float, tile * stride> y_storage;
  float *x_tile = x_storage, *y_tile = y_storage;
  const auto row_tiles = static_cast<unsigned>((rows + tile - 1) / tile);
  const auto column_tiles = static_cast<unsigned>((args.out_columns + tile - 1) / tile);
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * tile;
  const unsigned above = blockIdx.x / column_tiles;
  const int first_row = static_cast<int>(above % row_tiles) * tile;
  const int head = static_cast<int>(above / row_tiles % static_cast<unsigned>(heads));
  const int64_t image = above / row_tiles / static_cast<unsigned>(heads);
  const int x = static_cast<int>(threadIdx.x % tile), y = static_cast<int>(threadIdx.x / tile);
  const float* source = args.x + image * args.x_image + head * args.x_head;
  float sums[4] = {};
  for (int first = 0; first < args.depth; first += tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int line = y + 8 * i, row = first_row + line;
      const bool has_x = row < rows && first + x < args.depth;
      store_shared(x_tile + line * stride + x,
          has_x ? load_global<float>(source + row * args.x_row + first + x) : 0.0f);
      const bool has_y = first + line < args.depth && first_column + x < args.columns;
      const int64_t at = args.y_first + head * args.y_head + (first + line) * args.y_depth +
                         (first_column + x) * args.y_column;
      store_shared(y_tile + line * stride + x, has_y ? parameter_at<T>(args.y, at, 0) : 0.0f);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < tile; ++k) {
      const float right = load_shared<float>(y_tile + k * stride + x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] = fmaf(load_shared<float>(x_tile + (y + 8 * i) * stride + k), right, sums[i]);
      }
    }
    __syncthreads();
  }
  const int column = first_column + x;
  if (column >= args.out_columns) return;
  const bool has_term = args.row != nullptr && column < args.columns;
  const float bias =
      has_term ? parameter_at<T>(args.bias, args.bias_first + head * args.bias_head + column, 0)
               : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + y + 8 * i;
    if (row >= rows) continue;
    if (has_term) {
      sums[i] =
          fmaf(load_global<float>(args.row + (head * batch + image) * rows + row), bias, sums[i]);
    }
    const int64_t at = image * args.out_image + head * args.out_head + row * args.out_row + column;
    const float value = sums[i] * args.factor;
    if (args.out_is_float32) {
      store_global(static_cast<float*>(args.out) + at, value);
    } else {
      store_global(static_cast<T*>(args.out) + at, narrow(value, T{}));
    }
  }
}

template <typename T>
void launch_small_product(
    const CoAttentionShape& shape, const SmallProduct& args, cudaStream_t stream) {
  const int64_t tiles =
      divide_up(shape.global_tokens, product_tile) * divide_up(args.out_columns, product_tile);
  const int64_t blocks = shape.batch * shape.heads * tiles;
  launch("co_attention_small_product", co_attention_small_product<T>,
      {dim3{static_cast<unsigned>(blocks)}, dim3{256}}, stream, args, shape.batch,
      static_cast<int>(shape.heads), static_cast<int>(shape.global_tokens));
}

}  // namespace dsnet::cuda
