// Products of matrices in shared memory by one warp: 16-bit values on tensor cores, float32 by
// ordinary multiplications and additions.
//
// All results have one layout: tile t of a lane holds rows lane/4 (values 0, 1) and lane/4 + 8
// (values 2, 3) of columns 8·t + 2·(lane%4) and the next.
#pragma once

#include "cuda/pack.cuh"

namespace dsnet::cuda {

DSNET_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }

// Elements from one row of `columns` to the next in shared memory: an odd number of 16-byte units,
// so that eight rows at one column touch all banks once.
template <typename T, int columns>
constexpr int row_stride = columns + 16 / static_cast<int>(sizeof(T));

// Sixteen rows of `depth` values as the left operand; in registers where those are few.
template <typename T, int depth>
class LeftRows {
 public:
  static constexpr bool is_held = depth <= 32;

  DSNET_DEVICE explicit LeftRows(const T* rows)
      : source_(rows + lane_id() % 16 * row_stride<T, depth> + lane_id() / 16 * 8) {
    if constexpr (is_held) {
#pragma unroll
      for (int k = 0; k < depth / 16; ++k) load_matrices(held_[k], source_ + 16 * k);
    }
  }

  DSNET_DEVICE void fragment(int k, uint32_t (&a)[4]) const {
    if constexpr (is_held) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held_[k][i];
    } else {
      load_matrices(a, source_ + 16 * k);
    }
  }

 private:
  const T* source_;
  uint32_t held_[is_held ? depth / 16 : 1][4];
};

template <int depth>
class LeftRows<float, depth> {
 public:
  DSNET_DEVICE explicit LeftRows(const float* rows)
      : source_(rows + lane_id() / 4 * row_stride<float, depth>) {}

  // Four values of row lane/4 + 8·half from column k on.
  DSNET_DEVICE Pack<float, 4> values(int half, int k) const {
    return load_shared<Pack<float, 4>>(source_ + 8 * half * row_stride<float, depth> + k);
  }

 private:
  const float* source_;
};

// The transpose of sixteen columns of a matrix (…, width) as the left operand.
template <typename T, int width>
class LeftColumns {
 public:
  DSNET_DEVICE explicit LeftColumns(const T* columns)
      : source_(columns + (lane_id() / 16 * 8 + lane_id() % 8) * row_stride<T, width> +
                lane_id() / 8 % 2 * 8) {}

  DSNET_DEVICE void fragment(int k, uint32_t (&a)[4]) const {
    load_matrices<true>(a, source_ + 16 * k * row_stride<T, width>);
  }

 private:
  const T* source_;
};

template <int width>
class LeftColumns<float, width> {
 public:
  DSNET_DEVICE explicit LeftColumns(const float* columns) : source_(columns + lane_id() / 4) {}

  // Four values of column lane/4 + 8·half from row k on.
  DSNET_DEVICE Pack<float, 4> values(int half, int k) const {
    Pack<float, 4> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.values[i] =
          load_shared<float>(source_ + (k + i) * row_stride<float, width> + 8 * half);
    }
    return result;
  }

 private:
  const float* source_;
};

// result += left · rightᵀ with `right` (8·tiles, depth); tiles from `used` on may be left out.
template <typename T, int depth, int tiles>
DSNET_DEVICE void multiply_transposed(
    const LeftRows<T, depth>& left, const T* right, int used, float (&result)[tiles][4]) {
  static_assert(tiles % 2 == 0, "one instruction loads two tiles");
  constexpr int stride = row_stride<T, depth>;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const T* from = right + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
    // Limit on steps at once: registers.
#pragma unroll(depth > 64 ? 1 : depth / 16)
    for (int k = 0; k < depth / 16; ++k) {
      uint32_t a[4];
      left.fragment(k, a);
#pragma unroll
      for (int t = 0; t < tiles; t += 2) {
        if (t >= used) continue;
        uint32_t both[4];
        load_matrices(both, from + 8 * t * stride + 16 * k);
        const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        mma_16x8x16<T>(result[t], a, first);
        if (t + 1 < used) mma_16x8x16<T>(result[t + 1], a, second);
      }
    }
  } else {
    const T* from = right + lane % 4 * 2 * stride;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      const Pack<float, 4> a[2] = {left.values(0, k), left.values(1, k)};
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        if (t >= used) continue;
        const T* row = from + 8 * t * stride + k;
        const auto b0 = load_shared<Pack<float, 4>>(row);
        const auto b1 = load_shared<Pack<float, 4>>(row + stride);
        // Four products are added by themselves first: a quarter of the roundings at full size.
        float part[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          part[0] = fmaf(a[0].values[i], b0.values[i], part[0]);
          part[1] = fmaf(a[0].values[i], b1.values[i], part[1]);
          part[2] = fmaf(a[1].values[i], b0.values[i], part[2]);
          part[3] = fmaf(a[1].values[i], b1.values[i], part[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) result[t][i] += part[i];
      }
    }
  }
}

// result += left · right with `right` (depth, 8·tiles).
template <typename T, int depth, typename Left, int tiles>
DSNET_DEVICE void multiply(const Left& left, const T* right, float (&result)[tiles][4]) {
  static_assert(tiles % 2 == 0, "one instruction loads two tiles");
  constexpr int stride = row_stride<T, 8 * tiles>;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const T* from = right + (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < depth / 16; ++k) {
      uint32_t a[4];
      left.fragment(k, a);
#pragma unroll
      for (int t = 0; t < tiles; t += 2) {
        uint32_t both[4];
        load_matrices<true>(both, from + 16 * k * stride + 8 * t);
        const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        mma_16x8x16<T>(result[t], a, first);
        mma_16x8x16<T>(result[t + 1], a, second);
      }
    }
  } else {
    const T* from = right + lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      const Pack<float, 4> a[2] = {left.values(0, k), left.values(1, k)};
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        // As above.
        float part[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto b = load_shared<Pack<float, 2>>(from + (k + i) * stride + 8 * t);
          part[0] = fmaf(a[0].values[i], b.values[0], part[0]);
          part[1] = fmaf(a[0].values[i], b.values[1], part[1]);
          part[2] = fmaf(a[1].values[i], b.values[0], part[2]);
          part[3] = fmaf(a[1].values[i], b.values[1], part[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) result[t][i] += part[i];
      }
    }
  }
}

// result += left · right with `left` (16, 8·depth_tiles), a result itself, rounded to T, and
// `right` (8·depth_tiles, 8·tiles). The first `used` tiles of left count, the others are zero;
// the rows of `right` must be numbers up to the next multiple of 16.
template <typename T, int depth_tiles, int tiles>
DSNET_DEVICE void multiply_result(
    const float (&left)[depth_tiles][4], const T* right, int used, float (&result)[tiles][4]) {
  static_assert(depth_tiles % 2 == 0 && tiles % 2 == 0, "one instruction takes two tiles");
  constexpr int stride = row_stride<T, 8 * tiles>;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const T* from = right + (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < depth_tiles; k += 2) {
      if (k >= used) continue;
      const uint32_t a[4] = {narrow_pair(left[k][0], left[k][1], T{}),
          narrow_pair(left[k][2], left[k][3], T{}),
          narrow_pair(left[k + 1][0], left[k + 1][1], T{}),
          narrow_pair(left[k + 1][2], left[k + 1][3], T{})};
#pragma unroll
      for (int t = 0; t < tiles; t += 2) {
        uint32_t both[4];
        load_matrices<true>(both, from + 8 * k * stride + 8 * t);
        const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        mma_16x8x16<T>(result[t], a, first);
        mma_16x8x16<T>(result[t + 1], a, second);
      }
    }
  } else {
    const T* from = right + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < depth_tiles; ++k) {
      if (k >= used) continue;
      // Two rows at a time: more at once would only take registers.
#pragma unroll 1
      for (int source = 0; source < 4; ++source) {
        const T* row = from + (8 * k + 2 * source) * stride;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float low = shuffle(left[k][j], source, full_warp, 4);
          const float high = shuffle(left[k][2 + j], source, full_warp, 4);
#pragma unroll
          for (int t = 0; t < tiles; ++t) {
            const auto b = load_shared<Pack<float, 2>>(row + j * stride + 8 * t);
            result[t][0] = fmaf(low, b.values[0], result[t][0]);
            result[t][1] = fmaf(low, b.values[1], result[t][1]);
            result[t][2] = fmaf(high, b.values[0], result[t][2]);
            result[t][3] = fmaf(high, b.values[1], result[t][3]);
          }
        }
      }
    }
  }
}

// Transposes a 4×4 matrix whose row i is held by lane i of four, `step` apart: afterwards lane i
// holds column i.
template <typename V>
DSNET_DEVICE void transpose_among_lanes(V (&v)[4], unsigned step) {
  const bool is_odd = threadIdx.x & step, is_upper = threadIdx.x & (2 * step);
#pragma unroll
  for (int p = 0; p < 4; p += 2) {
    const V kept = is_odd ? v[p + 1] : v[p];
    const V got = shuffle_xor(is_odd ? v[p] : v[p + 1], step);
    v[p] = is_odd ? got : kept;
    v[p + 1] = is_odd ? kept : got;
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const V kept = is_upper ? v[p + 2] : v[p];
    const V got = shuffle_xor(is_upper ? v[p] : v[p + 2], 2 * step);
    v[p] = is_upper ? got : kept;
    v[p + 2] = is_upper ? kept : got;
  }
}

// Columns 8·(first + lane%4) to the eighth after it of row lane/4 + 8·half.
template <int tiles>
DSNET_DEVICE void gather_row(
    const float (&result)[tiles][4], int first, int half, float (&row)[8]) {
  // Not as pairs of 64 bits, which take more registers.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float values[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) values[t] = result[first + t][2 * half + i];
    transpose_among_lanes(values, 1);
#pragma unroll
    for (int t = 0; t < 4; ++t) row[2 * t + i] = values[t];
  }
}

// 16 bytes of global memory, by value where not `packed`.
template <typename T>
DSNET_DEVICE Stored<T, 16 / sizeof(T)> load_sixteen(const T* p, bool packed) {
  constexpr int width = 16 / sizeof(T);
  if (packed) return load_global<Stored<T, width>>(p);
  Pack<T, width> values;
#pragma unroll
  for (int i = 0; i < width; ++i) values.values[i] = load_global<T>(p + i);
  Stored<T, width> stored;
  memcpy(&stored, &values, sizeof(stored));
  return stored;
}

// N neighbours in global memory.
template <typename T, int N>
DSNET_DEVICE void load_values(const T* p, bool packed, float (&out)[N]) {
  constexpr int width = 16 / sizeof(T);
  static_assert(N % width == 0, "whole accesses of 16 bytes");
#pragma unroll
  for (int i = 0; i < N; i += width) {
    float part[width];
    widen<T>(load_sixteen(p + i, packed), part);
#pragma unroll
    for (int k = 0; k < width; ++k) out[i + k] = part[k];
  }
}

// The first `count` of eight neighbours, the others zero; packed, count is 8 or none.
template <typename T>
DSNET_DEVICE void load_eight(const T* p, int count, bool packed, float (&out)[8]) {
  if (packed && count > 0) return load_values(p, true, out);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < count ? widen(load_global<T>(p + i)) : 0.0f;
}

template <typename T>
DSNET_DEVICE void store_eight(T* p, const float (&values)[8]) {
  constexpr int width = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += width) {
    float part[width];
#pragma unroll
    for (int k = 0; k < width; ++k) part[k] = values[i + k];
    store_global(p + i, narrow<T>(part));
  }
}

// The same of the first `count` neighbours, by value where not `packed`; packed, count is 8 or
// none.
template <typename T>
DSNET_DEVICE void store_eight(T* p, int count, bool packed, const float (&values)[8]) {
  if (packed) {
    if (count > 0) store_eight(p, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) store_global(p + i, narrow(values[i], T{}));
  }
}

// Adds neighbours in global memory to the first `count` values, likewise.
template <typename T>
DSNET_DEVICE void add_eight(const T* p, int count, bool packed, float (&values)[8]) {
  if (count <= 0) return;
  float added[8] = {};
  if (packed) {
    load_values(p, true, added);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) added[i] = widen(load_global<T>(p + i));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] += added[i];
}

// Copies 16 bytes to shared memory, or zeros where not `valid`; lands at a wait_copies.
template <typename T>
DSNET_DEVICE void copy_sixteen(T* shared, const T* global, bool valid, bool packed) {
  constexpr int width = 16 / sizeof(T);
  if (packed) {
    copy_async<16>(shared, global, valid ? 16 : 0);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      store_shared(shared + i, valid ? load_global<T>(global + i) : narrow(0.0f, T{}));
    }
  }
}

}  // namespace dsnet::cuda
