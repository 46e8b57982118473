// Upsampling, concatenation and 1×1 mixing on the GPU: backward. To be included by one translation
// unit.
//
// With G = branch_scale·grad, upᵀ the adjoint of bilinear upsampling and D = upᵀ(G), in float32,
//   dlocal = G·W_l   dglobal = D·W_g   dW_l = Gᵀ·local   dW_g = Dᵀ·global   dbias = Σ D
// the last since the weights of a pixel sum to one.
#pragma once

#include "cuda/sum_slots.h"
#include "cuda/upsample_concat.cuh"

namespace dsnet::cuda {

// D: each cell gathers the pixels that lie beside it.
template <typename T, int P>
__global__ void __launch_bounds__(UpsampleLaunch::threads, gather_blocks)
    upsample_concat_gather(const UpsampleBackward args, const UpsampleLaunch l) {
  constexpr int row_values = UpsampleLaunch::gather_packs * P;
  __shared__ SharedArray<float, UpsampleLaunch::gather_rows * row_values> exchange_storage;
  const UpsampleShape& shape = args.shape;
  const auto groups = static_cast<unsigned>(l.gather_groups);
  const int y = static_cast<int>(threadIdx.y), lane = y % l.lanes;
  const int64_t cell =
      int64_t{blockIdx.x / groups} * (UpsampleLaunch::gather_rows / l.lanes) + y / l.lanes;
  const int64_t column =
      (int64_t{blockIdx.x % groups} * UpsampleLaunch::gather_packs + threadIdx.x) * P;
  const bool is_active = cell < shape.batch * shape.cells && column < shape.channels;
  float* exchange = exchange_storage + y * row_values + static_cast<int>(threadIdx.x) * P;

  float sum[P] = {};
  const int64_t image = cell / shape.cells;
  if (is_active) {
    const Axis rows(shape.height, shape.global_height), columns(shape.width, shape.global_width);
    const auto cell_row = static_cast<int>(cell % shape.cells / shape.global_width);
    const auto cell_column = static_cast<int>(cell % shape.global_width);
    const int first_row = first_pixel(rows, cell_row - 1);
    const int last_row = first_pixel(rows, cell_row + 1);
    const int first_column = first_pixel(columns, cell_column - 1);
    const int extent = first_pixel(columns, cell_column + 1) - first_column;
    const T* grad =
        static_cast<const T*>(args.grad) + image * shape.pixels * shape.channels + column;
    // Every lane takes every `lanes`-th pixel, row by row.
    int row = extent > 0 ? first_row + lane / extent : last_row;
    int offset = extent > 0 ? lane % extent : 0;
    while (row < last_row) {
      const float weight = Sample(rows, row).weight_of(cell_row) *
                           Sample(columns, first_column + offset).weight_of(cell_column);
      const int64_t pixel = row * shape.width + first_column + offset;
      float values[P];
      widen<T>(load_global<Stored<T, P>>(grad + pixel * shape.channels), values);
#pragma unroll
      for (int i = 0; i < P; ++i) sum[i] = fmaf(weight, values[i], sum[i]);
      offset += l.lanes;
      row += offset / extent;
      offset %= extent;
    }
  }
  constexpr int width = P < 4 ? P : 4;
  using Part = Pack<float, width>;
#pragma unroll
  for (int i = 0; i < P; i += width) {
    Part part;
#pragma unroll
    for (int k = 0; k < width; ++k) part.values[k] = sum[i + k];
    store_shared(exchange + i, part);
  }
  __syncthreads();
  if (!is_active || lane > 0) return;
  const float factor = Factors{args.branch_scale, 1}.at<T>(image);
  float* out = args.grad_mixed + cell * shape.channels + column;
#pragma unroll
  for (int i = 0; i < P; i += width) {
    auto total = load_shared<Part>(exchange + i);
    for (int other = 1; other < l.lanes; ++other) {
      const auto part = load_shared<Part>(exchange + other * row_values + i);
#pragma unroll
      for (int k = 0; k < width; ++k) total.values[k] += part.values[k];
    }
#pragma unroll
    for (int k = 0; k < width; ++k) total.values[k] *= factor;
    store_global(out + i, total);
  }
}

// out = factor · (left · right), left in L and computed so.
template <typename L, typename T>
__global__ void __launch_bounds__(UpsampleLaunch::threads, product_blocks)
    upsample_concat_backward_rows(const Matrix<L> left, const Matrix<T> right,
        const Factors factors, int64_t column_blocks, bool packed, T* out) {
  const ProductPlace place(column_blocks);
  float result[UpsampleLaunch::block_columns / 8][4] = {};
  RowProduct<L, T, false>::compute(left, right, place, packed, result);
  for_each_eight(result, [&](int block_row, int block_column, const float (&product)[8]) {
    const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
    const int count = row < left.rows ? part_of_eight(column, right.columns) : 0;
    if (count == 0) return;
    const float factor = factors.at<T>(row);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = factor * product[i];
    store_eight(out + row * right.columns + column, count, packed, values);
  });
}

// Where a block of upsample_concat_backward_weight leaves partial sums.
struct WeightSums {
  float* weight;   // (slots, columns of left, stride)
  float* bias;     // (slots, columns of left), or null
  int64_t stride;  // Cl + Cg
  int64_t rows_of_slot;
  int64_t left_blocks;   // across the columns of left
  int64_t right_blocks;  // across those of right
};

template <typename L>
inline constexpr size_t weight_bytes =
    4 * tile_depth * row_stride<L, UpsampleLaunch::block_columns> * sizeof(L);

// Of one slot's rows of left (rows, C) and right: leftᵀ·right, and the column sums of left. Left is
// multiplied by the factors and rounded to L again.
template <typename L, typename T>
__global__ void __launch_bounds__(UpsampleLaunch::threads, product_blocks)
    upsample_concat_backward_weight(const Matrix<L> left, const Matrix<T> right,
        const Factors factors, bool packed, const WeightSums sums) {
  constexpr int columns = UpsampleLaunch::block_columns;
  constexpr int tile_values = tile_depth * row_stride<L, columns>;
  static_assert(UpsampleLaunch::block_rows == columns, "left and right tiles are alike");
  const auto right_blocks = static_cast<unsigned>(sums.right_blocks);
  const auto left_blocks = static_cast<unsigned>(sums.left_blocks);
  const int64_t first_right = int64_t{blockIdx.x % right_blocks} * columns;
  const int64_t first_left = int64_t{blockIdx.x / right_blocks % left_blocks} * columns;
  const int64_t slot = blockIdx.x / right_blocks / left_blocks;
  const int64_t begin = slot * sums.rows_of_slot, end = begin + sums.rows_of_slot;
  Matrix<L> own_left = left;
  Matrix<T> own_right = right;
  own_left.rows = own_right.rows = end < left.rows ? end : left.rows;
  const int64_t rows = own_left.rows > begin ? own_left.rows - begin : 0;

  L* shared = dynamic_shared<L>();
  const auto copy = [&](int i, int stage) {
    const int64_t row = begin + int64_t{i} * tile_depth;
    L* to = shared + stage * 2 * tile_values;
    copy_tile<tile_depth, columns>(to, own_left, row, first_left, packed, factors);
    copy_tile<tile_depth, columns>(to + tile_values, own_right, row, first_right, packed);
  };
  const int thread = static_cast<int>(threadIdx.x), warp_column = thread / 32 * 16;
  const bool has_bias = sums.bias != nullptr && first_right == 0 && thread < columns;
  float result[columns / 8][4] = {}, bias = 0;
  // A slot behind the last row leaves zeros.
  const int tiles = rows > 0 ? static_cast<int>((rows + tile_depth - 1) / tile_depth) : 1;
  for_each_tile<2>(tiles, copy, [&](int, int stage) {
    const L* from = shared + stage * 2 * tile_values;
    multiply<L, tile_depth>(
        LeftColumns<L, columns>(from + warp_column), from + tile_values, result);
    if (!has_bias) return;
    for (int row = 0; row < tile_depth; ++row) {
      bias += widen(load_shared<L>(from + row * row_stride<L, columns> + thread));
    }
  });

  for_each_eight(result, [&](int block_row, int block_column, const float (&values)[8]) {
    const int64_t channel = first_left + block_row, column = first_right + block_column;
    const int count = channel < left.columns ? part_of_eight(column, right.columns) : 0;
    if (count == 0) return;
    float* out = sums.weight + (slot * left.columns + channel) * sums.stride + column;
    store_eight(out, count, packed, values);
  });
  if (has_bias && first_left + thread < left.columns) {
    store_global(sums.bias + slot * left.columns + first_left + thread, bias);
  }
}

template <typename T>
void launch_gather(const UpsampleBackward& args, const UpsampleLaunch& l, cudaStream_t stream) {
  const Grid grid{dim3{static_cast<unsigned>(l.gather_blocks * l.gather_groups)},
      dim3{UpsampleLaunch::gather_packs, UpsampleLaunch::gather_rows}};
  const auto kernel =
      l.pack == 1 ? upsample_concat_gather<T, 1> : upsample_concat_gather<T, 16 / sizeof(T)>;
  launch("upsample_concat_gather", kernel, grid, stream, args, l);
}

// The gradient of one stream, `left` being that of what it is mixed to.
template <typename L, typename T>
void launch_rows(const Matrix<L>& left, const Matrix<T>& right, const Factors& factors,
    int64_t row_blocks, int64_t column_blocks, bool packed, void* out, cudaStream_t stream) {
  const Grid grid{dim3{static_cast<unsigned>(row_blocks * column_blocks)},
      dim3{UpsampleLaunch::threads}, RowProduct<L, T, false>::bytes};
  launch("upsample_concat_backward_rows", upsample_concat_backward_rows<L, T>, grid, stream, left,
      right, factors, column_blocks, packed, static_cast<T*>(out));
}

template <typename L, typename T>
void launch_weight(const Matrix<L>& left, const Matrix<T>& right, const Factors& factors,
    bool packed, int64_t slots, const WeightSums& sums, cudaStream_t stream) {
  const Grid grid{dim3{static_cast<unsigned>(slots * sums.left_blocks * sums.right_blocks)},
      dim3{UpsampleLaunch::threads}, weight_bytes<L>};
  launch("upsample_concat_backward_weight", upsample_concat_backward_weight<L, T>, grid, stream,
      left, right, factors, packed, sums);
}

}  // namespace dsnet::cuda
