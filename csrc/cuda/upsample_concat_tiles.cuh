// What the kernels of upsampling and concatenation share: products of matrices in global memory by
// blocks of 64 rows and 64 columns, bilinear sampling.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/upsample_concat.h"

namespace dsnet::cuda {

// Of the contracted dimension, in shared memory at a time.
inline constexpr int tile_depth = 32;

// Blocks that share a multiprocessor, by the registers that they take without spills: of a product,
// of one that samples, of the gather.
inline constexpr int product_blocks = 5, sampling_blocks = 4, gather_blocks = 8;

// Which rows and columns a block works on.
struct ProductPlace {
  int64_t first_row;
  int64_t first_column;

  DSNET_DEVICE explicit ProductPlace(int64_t column_blocks) {
    const auto blocks = static_cast<unsigned>(column_blocks);
    first_row = int64_t{blockIdx.x / blocks} * UpsampleLaunch::block_rows;
    first_column = int64_t{blockIdx.x % blocks} * UpsampleLaunch::block_columns;
  }
};

// `rows` × `columns` of a matrix to shared memory as V, times the factors of its rows; zero outside
// the matrix. Lands at a wait_copies.
template <int rows, int columns, typename V, typename T>
DSNET_DEVICE void copy_tile(V* shared, const Matrix<T>& matrix, int64_t first_row,
    int64_t first_column, bool packed, const Factors& factors = {}) {
  constexpr int units = columns / 8;
  for (int i = static_cast<int>(threadIdx.x); i < rows * units; i += UpsampleLaunch::threads) {
    const int64_t row = first_row + i / units, column = first_column + i % units * 8;
    const int count = row < matrix.rows ? part_of_eight(column, matrix.columns) : 0;
    const T* from = count > 0 ? matrix.data + row * matrix.stride + column : matrix.data;
    V* to = shared + i / units * row_stride<V, columns> + i % units * 8;
    if constexpr (std::is_same_v<V, T>) {
      if (packed && factors.values.data == nullptr) {
        constexpr int width = 16 / sizeof(T);
#pragma unroll
        for (int k = 0; k < 8; k += width) copy_sixteen(to + k, from + k, count > 0, true);
        continue;
      }
    }
    float values[8];
    load_eight(from, count, packed, values);
    const float factor = count > 0 ? factors.at<T>(row) : 1.0f;
    constexpr int width = 16 / sizeof(V);
#pragma unroll
    for (int k = 0; k < 8; k += width) {
      float part[width];
#pragma unroll
      for (int j = 0; j < width; ++j) part[j] = values[k + j] * factor;
      store_shared(to + k, narrow<V>(part));
    }
  }
}

// A block's left · rightᵀ (`transposed`) or left · right, 16 rows and 64 columns per warp, computed
// in L; `right` is converted.
template <typename L, typename T, bool transposed>
class RowProduct {
 public:
  static constexpr int rows = UpsampleLaunch::block_rows, columns = UpsampleLaunch::block_columns;
  static constexpr int left_values = rows * row_stride<L, tile_depth>;
  static constexpr int right_values =
      transposed ? columns * row_stride<L, tile_depth> : tile_depth * row_stride<L, columns>;
  static constexpr int stage_values = left_values + right_values;
  static constexpr size_t bytes = 2 * stage_values * sizeof(L);

  DSNET_DEVICE static void compute(const Matrix<L>& left, const Matrix<T>& right,
      const ProductPlace& place, bool packed, float (&result)[columns / 8][4]) {
    L* shared = dynamic_shared<L>();
    const auto copy = [&](int i, int stage) {
      const int64_t depth = int64_t{i} * tile_depth;
      L* to = shared + stage * stage_values;
      copy_tile<rows, tile_depth>(to, left, place.first_row, depth, packed);
      if constexpr (transposed) {
        copy_tile<columns, tile_depth>(to + left_values, right, place.first_column, depth, packed);
      } else {
        copy_tile<tile_depth, columns>(to + left_values, right, depth, place.first_column, packed);
      }
    };
    const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
    const int tiles = static_cast<int>((left.columns + tile_depth - 1) / tile_depth);
    for_each_tile<2>(tiles, copy, [&](int, int stage) {
      const L* from = shared + stage * stage_values;
      const LeftRows<L, tile_depth> own(from + warp_row * row_stride<L, tile_depth>);
      if constexpr (transposed) {
        multiply_transposed(own, from + left_values, columns / 8, result);
      } else {
        multiply<L, tile_depth>(own, from + left_values, result);
      }
    });
  }
};

// Calls body(row of the block, column of the block, eight neighbouring values) for all of a warp's
// 16 rows and 64 columns.
template <int tiles, typename Body>
DSNET_DEVICE void for_each_eight(const float (&result)[tiles][4], const Body& body) {
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int group = 0; group < tiles / 4; ++group) {
      float values[8];
      gather_row(result, 4 * group, half, values);
      body(warp_row + lane / 4 + 8 * half, 32 * group + lane % 4 * 8, values);
    }
  }
}

// One dimension of both grids. As in torch's bilinear interpolation with align_corners=False, pixel
// i lies at cell (i + 1/2)·cells / pixels − 1/2, at least 0, in float32.
struct Axis {
  int pixels;
  int cells;
  float cells_per_pixel;

  DSNET_DEVICE Axis(int64_t pixel_count, int64_t cell_count)
      : pixels(static_cast<int>(pixel_count)),
        cells(static_cast<int>(cell_count)),
        cells_per_pixel(static_cast<float>(cells) / static_cast<float>(pixels)) {}
};

// The two cells that a pixel lies between, and what each counts.
struct Sample {
  int low, high;
  float low_weight, high_weight;

  DSNET_DEVICE Sample(const Axis& axis, int pixel) {
    const float place =
        fmaxf(fmaf(axis.cells_per_pixel, static_cast<float>(pixel) + 0.5f, -0.5f), 0.0f);
    const int cell = static_cast<int>(place), last = axis.cells - 1;
    low = cell < last ? cell : last;
    high = low < last ? low + 1 : last;
    high_weight = place - static_cast<float>(cell);
    low_weight = 1.0f - high_weight;
  }

  DSNET_DEVICE float weight_of(int cell) const {
    return (cell == low ? low_weight : 0.0f) + (cell == high ? high_weight : 0.0f);
  }
};

// The first pixel between whose cells the lower one is `cell` or one behind it; an estimate, then
// corrected, since only the rounded places of pixels decide.
DSNET_DEVICE int first_pixel(const Axis& axis, int cell) {
  const float estimate = (static_cast<float>(cell) + 0.5f) / axis.cells_per_pixel;
  const auto most = static_cast<float>(axis.pixels);
  int pixel = estimate < most ? static_cast<int>(estimate) : axis.pixels;
  if (pixel > axis.pixels) pixel = axis.pixels;
  if (pixel < 0) pixel = 0;
  while (pixel > 0 && Sample(axis, pixel - 1).low >= cell) --pixel;
  while (pixel < axis.pixels && Sample(axis, pixel).low < cell) ++pixel;
  return pixel;
}

}  // namespace dsnet::cuda
