// What the kernels of the MLP share: products of matrices in global memory by blocks of 64 or 128
// rows and columns, GELU and its derivative.
#pragma once

#include "cuda/divide_up.h"
#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/pointwise_mlp.h"

namespace dsnet::cuda {

// Rows of a matrix to shared memory, `depth` columns at a time; zero outside the matrix.
template <typename T, int rows, int depth>
class RowCopies {
 public:
  DSNET_DEVICE RowCopies(const Matrix<T>& matrix, int64_t first_row, bool packed)
      : matrix_(matrix), packed_(packed) {
    const int64_t row = first_row + static_cast<int>(threadIdx.x) / units;
    from_ = matrix.data + row * matrix.stride;
    const int64_t left = matrix.rows - row;
    rows_left_ = left < 0 ? 0 : left < rows ? static_cast<int>(left) : rows;
  }

  // Lands at a wait_copies.
  DSNET_DEVICE void operator()(T* shared, int64_t first_column) const {
    const int thread = static_cast<int>(threadIdx.x), unit = thread % units * width;
    const int64_t column = first_column + unit, columns_left = matrix_.columns - column;
    T* to = shared + thread / units * row_stride<T, depth> + unit;
#pragma unroll
    for (int row = 0; row < rows; row += step) {
      const T* from = from_ + row * matrix_.stride + column;
      const bool has_row = row < rows_left_;
      if (packed_) {
        const bool valid = has_row && columns_left > 0;
        copy_async<16>(to, valid ? from : matrix_.data, valid ? 16 : 0);
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const bool valid = has_row && i < columns_left;
          store_shared(to + i, valid ? load_global<T>(from + i) : narrow(0.0f, T{}));
        }
      }
      to += step * row_stride<T, depth>;
    }
  }

  // Once this thread's copies have landed: replaces what it copied itself by change(row, values).
  template <typename Change>
  DSNET_DEVICE static void change(T* shared, const Change& change_values) {
    const int thread = static_cast<int>(threadIdx.x);
    T* at = shared + thread / units * row_stride<T, depth> + thread % units * width;
#pragma unroll
    for (int row = 0; row < rows; row += step) {
      float values[width];
      widen<T>(load_shared<Stored<T, width>>(at), values);
      change_values(thread / units + row, values);
      store_shared(at, narrow<T>(values));
      at += step * row_stride<T, depth>;
    }
  }
  // The first column of what a thread copies, from that of all on.
  DSNET_DEVICE static int own_column() { return static_cast<int>(threadIdx.x) % units * width; }

 private:
  static constexpr int width = 16 / sizeof(T), units = depth / width;
  static constexpr int step = MlpLaunch::threads / units;  // rows between those of a thread
  static_assert(MlpLaunch::threads % units == 0 && rows % step == 0, "threads have equal shares");

  Matrix<T> matrix_;
  const T* from_;
  int rows_left_;
  bool packed_;
};

// Tiles t and the next of a product's result, from fragments of both operands.
template <typename T, int groups, int tiles>
DSNET_DEVICE void multiply_pair(const uint32_t (&a)[groups][4], const uint32_t (&both)[4], int t,
    float (&result)[groups][tiles][4]) {
  const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    mma_16x8x16<T>(result[g][t], a[g], first);
    mma_16x8x16<T>(result[g][t + 1], a[g], second);
  }
}

// result += left · rightᵀ on tensor cores, left being 16·groups rows of `depth` values whose
// fragments are left(k, a), `right` (8·tiles, depth) in shared memory. Each fragment of `right` is
// loaded once for all groups.
template <typename T, int depth, int groups, int tiles, typename Left>
DSNET_DEVICE void multiply_groups_transposed(
    const Left& left, const T* right, float (&result)[groups][tiles][4]) {
  static_assert(tiles % 2 == 0, "one instruction loads two tiles");
  constexpr int stride = row_stride<T, depth>;
  const int lane = lane_id();
  const T* from = right + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
  // Limit on steps at once: registers.
#pragma unroll(depth > 32 ? 1 : depth / 16)
  for (int k = 0; k < depth / 16; ++k) {
    uint32_t a[groups][4];
    left(k, a);
#pragma unroll
    for (int t = 0; t < tiles; t += 2) {
      uint32_t both[4];
      load_matrices(both, from + 8 * t * stride + 16 * k);
      multiply_pair<T>(a, both, t, result);
    }
  }
}

// The same for left · right with `right` (depth, 8·tiles).
template <typename T, int depth, int groups, int tiles, typename Left>
DSNET_DEVICE void multiply_groups(
    const Left& left, const T* right, float (&result)[groups][tiles][4]) {
  static_assert(tiles % 2 == 0, "one instruction loads two tiles");
  constexpr int stride = row_stride<T, 8 * tiles>;
  const int lane = lane_id();
  const T* from = right + (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < depth / 16; ++k) {
    uint32_t a[groups][4];
    left(k, a);
#pragma unroll
    for (int t = 0; t < tiles; t += 2) {
      uint32_t both[4];
      load_matrices<true>(both, from + 16 * k * stride + 8 * t);
      multiply_pair<T>(a, both, t, result);
    }
  }
}

// Fragments of 16·groups rows in shared memory, for multiply_groups and its like.
template <typename T, int depth, int groups>
class SharedRows {
 public:
  DSNET_DEVICE explicit SharedRows(const T* rows)
      : source_(rows + lane_id() % 16 * row_stride<T, depth> + lane_id() / 16 * 8) {}

  DSNET_DEVICE void operator()(int k, uint32_t (&a)[groups][4]) const {
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      load_matrices(a[g], source_ + 16 * g * row_stride<T, depth> + 16 * k);
    }
  }

 private:
  const T* source_;
};

// Those of a result itself, rounded to T: its layout is the left operand's.
template <typename T, int groups, int tiles>
class RoundedRows {
 public:
  DSNET_DEVICE explicit RoundedRows(const float (&values)[groups][tiles][4]) : values_(values) {}

  DSNET_DEVICE void operator()(int k, uint32_t (&a)[groups][4]) const {
#pragma unroll
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&tile)[4] = values_[g][2 * k + r / 2];
        a[g][r] = narrow_pair(tile[r % 2 * 2], tile[r % 2 * 2 + 1], T{});
      }
    }
  }

 private:
  const float (&values_)[groups][tiles][4];
};

// Columns of a result, those of a parameter from `first` of `count` on, start from its values.
template <typename T, int groups, int tiles>
DSNET_DEVICE void start_from_bias(
    const Parameter& bias, int64_t first, int64_t count, float (&result)[groups][tiles][4]) {
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t column = first + 8 * t + lane_id() % 4 * 2 + i;
      const float value = column < count ? parameter_at<T>(bias, column, 0) : 0.0f;
#pragma unroll
      for (int g = 0; g < groups; ++g) result[g][t][i] = result[g][t][2 + i] = value;
    }
  }
}

// T(factor·(scale·x + shift)) of `rows` rows in shared memory; zero outside the matrix.
template <typename T, int rows, int width>
DSNET_DEVICE void load_affine(T* shared, const Matrix<T>& x, int64_t first_row,
    const Parameter& scale, const Parameter& shift, const Factors& factors, bool packed) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * (width / 8); i += MlpLaunch::threads) {
    const int column = i % (width / 8) * 8;
    const int64_t row = first_row + i / (width / 8);
    const int count = row < x.rows ? part_of_eight(column, x.columns) : 0;
    float values[8] = {};
    if (count > 0) {
      float scales[8], shifts[8];
      const float factor = factors.at<T>(row);
      load_eight(x.data + row * x.stride + column, count, packed, values);
      load_parameter_eight<T>(scale, column, count, packed, 1, scales);
      load_parameter_eight<T>(shift, column, count, packed, 0, shifts);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k < count) values[k] = factor * fmaf(scales[k], values[k], shifts[k]);
      }
    }
    store_shared(shared + i / (width / 8) * row_stride<T, width> + column, narrow<T>(values));
  }
}

// A block's left · rightᵀ; its four warps have 16·groups rows and 8·tiles columns each, two by two.
template <typename T, int groups, int tiles>
class MlpProduct {
 public:
  static constexpr int rows = 32 * groups, columns = 16 * tiles;
  static constexpr int column_parts = tiles / 4;  // of 32 columns, of a warp
  using Result = float[groups][tiles][4];

 private:
  static constexpr int depth = 32, stages = 3, stride = row_stride<T, depth>;
  static constexpr int stage_values = (rows + columns) * stride;

 public:
  static constexpr size_t bytes = stages * stage_values * sizeof(T);
  // That share a multiprocessor, by the registers that they take without spills.
  static constexpr int blocks = groups * tiles > 8 ? 2 : 4;

  // Adds to the result.
  DSNET_DEVICE static void compute(const Matrix<T>& left, const Matrix<T>& right, int64_t first_row,
      int64_t first_column, bool packed, Result& result) {
    T* shared = dynamic_shared<T>();
    const RowCopies<T, rows, depth> copy_left(left, first_row, packed);
    const RowCopies<T, columns, depth> copy_right(right, first_column, packed);
    const auto copy = [&](int i, int stage) {
      T* to = shared + stage * stage_values;
      copy_left(to, int64_t{i} * depth);
      copy_right(to + rows * stride, int64_t{i} * depth);
    };
    const auto count = static_cast<int>((left.columns + depth - 1) / depth);
    for_each_tile_ahead<stages>(count, copy, [&](int, int stage) {
      const T* own_left = shared + stage * stage_values + warp_row() * stride;
      const T* own_right = shared + stage * stage_values + (rows + warp_column()) * stride;
      if constexpr (sizeof(T) == 2) {
        multiply_groups_transposed<T, depth>(
            SharedRows<T, depth, groups>(own_left), own_right, result);
      } else {
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          multiply_transposed(
              LeftRows<T, depth>(own_left + 16 * g * stride), own_right, tiles, result[g]);
        }
      }
    });
  }

  // Calls body(row of the block, column of the block, g, half, part, eight neighbouring values) for
  // all of a warp's values; they are those of gather_row(result[g], 4·part, half).
  template <typename Body>
  DSNET_DEVICE static void for_each_eight(const Result& result, const Body& body) {
    const int lane = lane_id();
#pragma unroll
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int part = 0; part < column_parts; ++part) {
          float values[8];
          gather_row(result[g], 4 * part, half, values);
          body(warp_row() + 16 * g + lane / 4 + 8 * half, warp_column() + column_of(part), g, half,
              part, values);
        }
      }
    }
  }

  DSNET_DEVICE static int column_of(int part) { return 32 * part + lane_id() % 4 * 8; }
  DSNET_DEVICE static int warp_row() { return static_cast<int>(threadIdx.x / 64) * 16 * groups; }
  DSNET_DEVICE static int warp_column() {
    return static_cast<int>(threadIdx.x / 32 % 2) * 8 * tiles;
  }
};

template <typename T>
using SmallProduct64 = MlpProduct<T, 2, 4>;
template <typename T>
using LargeProduct128 = MlpProduct<T, 4, 8>;

// Φ(−v) for v ≥ 0: 2 to a polynomial fitted to log2 Φ(−v) on [0, 6], to 2.9e-6; beyond, the
// polynomial falls on.
DSNET_DEVICE float normal_tail(float v) {
  float power = -0.00039269604f;
  power = fmaf(power, v, 0.006674833f);
  power = fmaf(power, v, -0.051207315f);
  power = fmaf(power, v, -0.4602248f);
  power = fmaf(power, v, -1.1508658f);
  power = fmaf(power, v, -1.0000081f);
  return exp2_approx(power);
}

// Φ(u): for 16-bit T far below its rounding, in a third of erff's instructions.
template <typename T>
DSNET_DEVICE float normal_cumulative(float u) {
  if constexpr (sizeof(T) == 4) {
    return fmaf(0.5f, erff(u * 0.70710678f), 0.5f);
  } else {
    const float tail = normal_tail(fabsf(u));
    return u < 0 ? tail : 1 - tail;
  }
}

// u·Φ(u).
template <typename T>
DSNET_DEVICE float gelu(float u) {
  if constexpr (sizeof(T) == 4) {
    return u * normal_cumulative<T>(u);
  } else {
    const float v = fabsf(u);
    return fmaf(-v, normal_tail(v), fmaxf(u, 0.0f));
  }
}

struct GeluFacts {
  float value, slope;
};

// u·Φ(u) and Φ(u) + u·φ(u).
template <typename T>
DSNET_DEVICE GeluFacts gelu_facts(float u) {
  constexpr float exponent = -0.72134752f;  // −log2(e) / 2
  const float cumulative = normal_cumulative<T>(u);
  const float density = 0.39894228f * exp2_approx(exponent * u * u);
  return {u * cumulative, fmaf(u, density, cumulative)};
}

}  // namespace dsnet::cuda
