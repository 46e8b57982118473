// Weights rearranged for products, for the instruction set of this compilation.
#pragma once

#include "matmul.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Packs a right side (depth, columns): element (k, j) is from[k · stride + j], or with `transposed`
// from[j · stride + k], for j below `count` and 0 behind. In panels of a tile's columns, row by row.
template <typename V, bool transposed, typename T, typename Acc = typename V::Acc>
inline void pack_panels(const T* from, int64_t stride, int64_t count, int64_t depth,
    int64_t columns, Acc* to) {
  for (int64_t first = 0; first < columns; first += tile_columns<V>) {
    const int64_t width = smaller(tile_columns<V>, columns - first);
    const int64_t inside = count - first > 0 ? smaller(width, count - first) : 0;
    Acc* panel = to + first * depth;
    if constexpr (transposed) {
      transpose(inside, depth, from + first * stride, stride, panel, width);
      for (int64_t k = 0; inside < width && k < depth; ++k) {
        for (int64_t j = inside; j < width; ++j) panel[k * width + j] = 0;
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = from + k * stride + first;
        for (int64_t j = 0; j < width; j += V::size) {
          const int64_t n = inside - j;
          const V part = n >= V::size ? V::load(row + j) : n > 0 ? V::load(row + j, n) : V::zero();
          part.store(panel + k * width + j);
        }
      }
    }
  }
}

// The same of all heads' segments: `segments` blocks of `count` rows of a matrix (rows, depth),
// `distance` rows apart, are columns next to each other.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void pack_segments(const T* from, int64_t stride, int64_t segments, int64_t distance,
    int64_t count, int64_t depth, int64_t columns, Acc* to) {
  for (int64_t first = 0; first < columns; first += tile_columns<V>) {
    const int64_t width = smaller(tile_columns<V>, columns - first);
    Acc* panel = to + first * depth;
    for (int64_t j = 0; j < width;) {
      const int64_t segment = (first + j) / count, row = (first + j) % count;
      if (segment >= segments) {
        for (int64_t k = 0; k < depth; ++k) {
          for (int64_t i = j; i < width; ++i) panel[k * width + i] = 0;
        }
        break;
      }
      const int64_t run = smaller(width - j, count - row);
      transpose(run, depth, from + (segment * distance + row) * stride, stride, panel + j, width);
      j += run;
    }
  }
}

// Rounds a packed matrix and pairs its rows, where the product of T's pairs.
template <typename T, typename Acc>
inline void pair_panels(int64_t depth, int64_t columns, int64_t tile, Acc* packed) {
  if constexpr (Products<T>::pairs) {
    for (int64_t first = 0; first < columns; first += tile) {
      const int64_t width = smaller(tile, columns - first);
      Acc* panel = packed + first * depth;
      for (int64_t k = 0; k < depth; k += 2) {
        pair_rows(panel + k * width, k + 1 < depth ? panel + (k + 1) * width : nullptr, width);
      }
    }
  }
}

// c = start + a · b for b packed, of all columns of b. Of pairs with T's product.
template <typename V, typename T = typename V::Acc, typename Acc = typename V::Acc>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    const Acc* b, Start<Acc> start, Matrix<Acc> c) {
  for (int64_t first = 0; first < columns; first += tile_columns<V>) {
    const int64_t width = smaller(tile_columns<V>, columns - first);
    const Start<Acc> from{start.data == nullptr ? nullptr : start.data + first, start.stride};
    const int64_t stride = Products<T>::pairs ? 2 * width : width;
    multiply<false, V, typename Products<T>::type>(rows, width, depth_of<T>(depth), a,
        {b + first * depth, stride}, from, {c.data + first, c.stride});
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
