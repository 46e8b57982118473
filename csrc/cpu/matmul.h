// Small matrix products in registers, for the instruction set of this compilation.
#pragma once

#include "vec.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Rows and registers of a tile: its sums, a register row of B and one value of A fit the registers.
#if defined(__AVX512F__)
constexpr int tile_rows = 7, tile_registers = 3;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_registers = 2;
#else
constexpr int tile_rows = 2, tile_registers = 2;
#endif

template <typename T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

// Columns of B that a tile covers.
template <typename V>
constexpr int64_t tile_columns = tile_registers * V::size;

// Row-major values: element (i, j) at data[i · stride + j].
template <typename Acc>
struct Matrix {
  Acc* data;
  int64_t stride;
};

// What a product adds to: nothing, the same row for every row (stride 0), or a matrix.
template <typename Acc>
using Start = Matrix<const Acc>;

// What a tile adds up: products of values, or of pairs of bfloat16 in the words of floats, each
// word of A with the same word of B.
struct Values {
  static constexpr int rows = tile_rows;
  template <typename V>
  static V add_product(V a, V b, V sum) {
    return fma(a, b, sum);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int rows = tile_rows;
  static VecF32 add_product(VecF32 a, VecF32 b, VecF32 sum) {
    return {
        _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
};

// Tiles of whole pairs of rows, where sums become the right side of another product.
struct PairsByPairs : Pairs {
  static constexpr int rows = 8;
};
#endif

// How products of values stored as T are formed. With pairs, the rows of each product's operands
// are pairs of bfloat16 in the same memory, half as long (the left) or half as many (the right).
template <typename T>
struct Products {
  static constexpr bool pairs = false;
  using type = Values;
  using by_pairs = Values;
};
#if defined(__AVX512BF16__)
template <>
struct Products<bfloat16> {
  static constexpr bool pairs = true;
  using type = Pairs;
  using by_pairs = PairsByPairs;
};
#endif

// Terms of a sum of n.
template <typename T>
constexpr int64_t depth_of(int64_t n) {
  return Products<T>::pairs ? (n + 1) / 2 : n;
}

namespace detail {

// What follows takes `begin` and `finish`, called as begin(sums, row, column) with a tile's sums
// V[R][N] before and after its products.
template <bool transposed, typename Product, typename V, int R, int N, typename Begin,
    typename Finish, typename Acc = typename V::Acc>
inline void multiply_tile(Matrix<const Acc> a, Matrix<const Acc> b, int64_t depth, int64_t row,
    int64_t column, const Begin& begin, const Finish& finish) {
  // Unrolled in the source, or the sums would pass through memory before and after the loop.
  V sums[R][N];
  begin(sums, row, column);
  const Acc* line = b.data;
  for (int64_t k = 0; k < depth; ++k, line += b.stride) {
    V in[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      in[j] = V::load(line + j * V::size);
      in[j].keep();
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V value = V::fill(transposed ? a.data[k * a.stride + i] : a.data[i * a.stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = Product::add_product(value, in[j], sums[i][j]);
    }
  }
  finish(sums, row, column);
}

// The rows left below R.
template <bool transposed, typename Product, typename V, int R, int N, typename Begin,
    typename Finish, typename Acc = typename V::Acc>
inline void multiply_rest(int64_t rows, Matrix<const Acc> a, Matrix<const Acc> b, int64_t depth,
    int64_t row, int64_t column, const Begin& begin, const Finish& finish) {
  if constexpr (R > 0) {
    if (rows == R) {
      return multiply_tile<transposed, Product, V, R, N>(a, b, depth, row, column, begin, finish);
    }
    multiply_rest<transposed, Product, V, R - 1, N>(rows, a, b, depth, row, column, begin, finish);
  }
}

template <bool transposed, typename Product, typename V, int N, typename Begin, typename Finish,
    typename Acc = typename V::Acc>
__attribute__((noinline)) void multiply_columns(int64_t rows, Matrix<const Acc> a,
    Matrix<const Acc> b, int64_t depth, int64_t column, const Begin& begin, const Finish& finish) {
  constexpr int tile = Product::rows;
  int64_t row = 0;
  for (; rows - row >= tile; row += tile) {
    multiply_tile<transposed, Product, V, tile, N>(a, b, depth, row, column, begin, finish);
    a.data += transposed ? tile : tile * a.stride;
  }
  multiply_rest<transposed, Product, V, tile - 1, N>(
      rows - row, a, b, depth, row, column, begin, finish);
}

// The same for as many columns as `registers` hold.
template <bool transposed, typename Product, typename V, typename Begin, typename Finish,
    typename Acc = typename V::Acc>
inline void multiply_registers(int64_t registers, int64_t rows, Matrix<const Acc> a,
    Matrix<const Acc> b, int64_t depth, int64_t column, const Begin& begin, const Finish& finish) {
  if (registers == tile_registers) {
    multiply_columns<transposed, Product, V, tile_registers>(
        rows, a, b, depth, column, begin, finish);
  } else if (registers == 2) {
    multiply_columns<transposed, Product, V, 2>(rows, a, b, depth, column, begin, finish);
  } else {
    multiply_columns<transposed, Product, V, 1>(rows, a, b, depth, column, begin, finish);
  }
}

// Registers of the next tile where so many are left. Not 3 and 1: the products of one register
// wait for each other.
inline int64_t next_registers(int64_t left) {
  return left == 4 ? 2 : smaller(left, tile_registers);
}

}  // namespace detail

// Sums that begin as a matrix.
template <typename V, typename Acc = typename V::Acc>
struct From {
  Start<Acc> start{nullptr, 0};

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    if (start.data == nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sums[i][j] = V::zero();
      }
    } else {
      const Acc* data = start.data + row * start.stride + column;
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sums[i][j] = V::load(data + i * start.stride + j * V::size);
      }
    }
  }
};

// Sums that are stored to a matrix.
template <typename V, typename Acc = typename V::Acc>
struct To {
  Matrix<Acc> c;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    Acc* data = c.data + row * c.stride + column;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j].store(data + i * c.stride + j * V::size);
    }
  }
};

// Sums that are stored or, unless they are the first, added to what was stored.
template <typename V, typename Acc = typename V::Acc>
struct AddedTo {
  Matrix<Acc> c;
  bool first;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    if (!first) {
      const Acc* data = c.data + row * c.stride + column;
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
          sums[i][j] = V::load(data + i * c.stride + j * V::size) + sums[i][j];
        }
      }
    }
    To<V>{c}(sums, row, column);
  }
};

// a · b for a (rows, depth), b (depth, columns), with a's columns as rows if transposed. Columns
// are whole registers. A tile's sums start at `begin` and end at `finish`, see above. Each element
// is summed along depth in order, whatever the tiles.
template <bool transposed, typename V, typename Product = Values, typename Begin, typename Finish,
    typename Acc = typename V::Acc>
inline void multiply_with(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    Matrix<const Acc> b, const Begin& begin, const Finish& finish) {
  int64_t registers;
  for (int64_t j = 0; j < columns; j += registers * V::size) {
    registers = detail::next_registers((columns - j) / V::size);
    detail::multiply_registers<transposed, Product, V>(
        registers, rows, a, {b.data + j, b.stride}, depth, j, begin, finish);
  }
}

// c = start + a · b.
template <bool transposed, typename V, typename Product = Values, typename Acc = typename V::Acc>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    Matrix<const Acc> b, Start<Acc> start, Matrix<Acc> c) {
  multiply_with<transposed, V, Product>(rows, columns, depth, a, b, From<V>{start}, To<V>{c});
}

// Where a column of a matrix in panels lies: each panel holds the columns of a tile for the whole
// depth, panels follow one another.
struct Panel {
  int64_t first, columns;
};
template <typename V>
inline Panel panel_of(int64_t column, int64_t columns) {
  Panel panel{0, 0};
  do {
    panel.first += panel.columns;
    panel.columns = detail::next_registers((columns - panel.first) / V::size) * V::size;
  } while (column >= panel.first + panel.columns);
  return panel;
}

// Where the panel that begins at a column ends.
template <typename V>
inline int64_t panel_end(int64_t column, int64_t columns) {
  return column + detail::next_registers((columns - column) / V::size) * V::size;
}

// multiply_with for b in panels, of which those from column `from` up to column `to` are
// multiplied.
template <typename V, typename Product = Values, typename Begin, typename Finish,
    typename Acc = typename V::Acc>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    const Acc* b, const Begin& begin, const Finish& finish, int64_t from, int64_t to) {
  int64_t registers;
  for (int64_t j = from; j < to; j += registers * V::size) {
    registers = detail::next_registers((columns - j) / V::size);
    detail::multiply_registers<false, Product, V>(
        registers, rows, a, {b + j * depth, registers * V::size}, depth, j, begin, finish);
  }
}

// The same of all panels.
template <typename V, typename Product = Values, typename Begin, typename Finish,
    typename Acc = typename V::Acc>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t depth, Matrix<const Acc> a,
    const Acc* b, const Begin& begin, const Finish& finish) {
  multiply_panels<V, Product>(rows, columns, depth, a, b, begin, finish, 0, columns);
}

#if defined(__AVX512BF16__)

// The first n values of a row, rounded and packed in pairs at its beginning; n is even.
inline void pair_columns(float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 32) {
    const int64_t left = smaller(32, n - j), second = left > 16 ? left - 16 : 0;
    const __m512 low = VecF32::load(row + j, smaller(16, left)).v;
    const __m512 high = VecF32::load(row + j + 16, second).v;
    const auto pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_mask_storeu_epi32(row + j / 2, VecF32::first(left / 2), pairs);
  }
}

// Words of a rounded value of each.
inline VecF32 pair_of(VecF32 low, VecF32 high) {
  const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  // Word i takes halves i and 16 + i.
  const __m512i lows = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i highs = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  return {_mm512_castsi512_ps(_mm512_or_si512(lows, _mm512_slli_epi32(highs, 16)))};
}

// n columns of two rows, rounded and paired in the first; the second may be missing.
inline void pair_rows(float* first, const float* second, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const VecF32 high = second == nullptr ? VecF32::zero() : VecF32::load(second + j);
    pair_of(VecF32::load(first + j), high).store(first + j);
  }
}

#endif

template <typename Acc>
inline void copy_columns(int64_t rows, int64_t columns, const Acc* from, int64_t from_stride,
    Acc* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = from[i * from_stride + j];
  }
}

// to (columns, rows) = from (rows, columns) transposed.
template <typename Acc, typename T>
inline void transpose(
    int64_t rows, int64_t columns, const T* from, int64_t from_stride, Acc* to, int64_t to_stride) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    const int64_t i1 = smaller(i0 + block, rows);
    for (int64_t j0 = 0; j0 < columns; j0 += block) {
      const int64_t j1 = smaller(j0 + block, columns);
#if defined(__AVX512F__)
      if constexpr (is_float<Acc> && is_float<T>) {
        if (i1 - i0 == block && j1 - j0 == block) {
          transpose_block(
              from + i0 * from_stride + j0, from_stride, to + j0 * to_stride + i0, to_stride);
          continue;
        }
      }
#endif
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j)
          to[j * to_stride + i] = widened(from[i * from_stride + j]);
      }
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
