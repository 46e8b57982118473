// Weights rearranged for products, for the instruction set of this compilation.
#pragma once

#include "matmul.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Packs a right side (depth, columns) into the panels of multiply_panels: row k is row(k), of which
// `inside` columns count, with 0 behind.
template <typename V, typename Row, typename Acc = typename V::Acc>
inline void pack_rows(const Row& row, int64_t inside, int64_t depth, int64_t columns, Acc* to) {
  int64_t width;
  for (int64_t first = 0; first < columns; first += width) {
    width = panel_of<V>(first, columns).columns;
    Acc* panel = to + first * depth;
    for (int64_t k = 0; k < depth; ++k) {
      const auto* from = row(k) + first;
      for (int64_t j = 0; j < width; j += V::size) {
        const int64_t n = inside - first - j;
        const V part = n >= V::size ? V::load(from + j) : n > 0 ? V::load(from + j, n) : V::zero();
        part.store(panel + k * width + j);
      }
    }
  }
}

// The same of a matrix: element (k, j) is from[k · stride + j], or with `transposed`
// from[j · stride + k].
template <typename V, bool transposed, typename T, typename Acc = typename V::Acc>
inline void pack_panels(
    const T* from, int64_t stride, int64_t count, int64_t depth, int64_t columns, Acc* to) {
  if constexpr (!transposed) {
    pack_rows<V>([&](int64_t k) { return from + k * stride; }, count, depth, columns, to);
    return;
  }
  int64_t width;
  for (int64_t first = 0; first < columns; first += width) {
    width = panel_of<V>(first, columns).columns;
    const int64_t inside = count > first ? smaller(width, count - first) : 0;
    Acc* panel = to + first * depth;
    transpose(inside, depth, from + first * stride, stride, panel, width);
    for (int64_t k = 0; inside < width && k < depth; ++k) {
      for (int64_t j = inside; j < width; ++j) panel[k * width + j] = 0;
    }
  }
}

// The same, transposed, of `segments` blocks of `count` rows of a matrix (rows, depth), `distance`
// rows apart: their rows are columns next to each other.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void pack_segments(const T* from, int64_t stride, int64_t segments, int64_t distance,
    int64_t count, int64_t depth, int64_t columns, Acc* to) {
  int64_t width;
  for (int64_t first = 0; first < columns; first += width) {
    width = panel_of<V>(first, columns).columns;
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

// Rounds packed values and pairs their rows, where T's products are of pairs.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void pair_panels(int64_t depth, int64_t columns, Acc* packed) {
  if constexpr (Products<T>::pairs) {
    int64_t width;
    for (int64_t first = 0; first < columns; first += width) {
      width = panel_of<V>(first, columns).columns;
      Acc *from = packed + first * depth, *to = packed + first * depth_of<T>(depth);
      for (int64_t k = 0; k < depth; k += 2) {
        pair_rows(from + k * width, k + 1 < depth ? from + (k + 1) * width : nullptr, width);
        copy_columns(1, width, from + k * width, width, to + k / 2 * width, width);
      }
    }
  }
}

// c = start + a · b for b packed, all its columns, as T's products.
template <typename V, typename T = typename V::Acc, typename Acc = typename V::Acc>
inline void multiply_packed(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    const Acc* b, Start<Acc> start, Matrix<Acc> c) {
  multiply_panels<V, typename Products<T>::type>(
      rows, columns, depth_of<T>(depth), a, b, From<V>{start}, To<V>{c});
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
