// What both directions of the MLP do with weights and tokens, for the instruction set of this
// compilation.
#pragma once

#include "gelu.h"
#include "panels.h"
#include "parts.h"
#include "pointwise_mlp.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

template <typename T, typename Acc = AccumulatorOf<T>>
Matrix<const Acc> operand_of(const MlpWeight& weight) {
  return {static_cast<const Acc*>(weight.data()), weight.stride};
}

// Writes rows of an operand into its memory.
template <typename T>
void stage(const MlpWeight& weight, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  constexpr int64_t block = MlpLayout::stage_rows;
  const int64_t depth = weight.depth();
  Acc* wide = static_cast<Acc*>(memory);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task * block, rows = smaller(block, weight.operand_rows() - row);
    Acc* out = static_cast<Acc*>(weight.memory) + row * weight.stride;
    Acc* to = Products<T>::pairs ? wide : out;
    const int64_t stride = Products<T>::pairs ? padded(depth + 1) : weight.stride;
    const auto widen = [&](const auto* from) {
      if (weight.transposed) return transpose(depth, rows, from + row, weight.columns, to, stride);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < depth; ++k)
          to[i * stride + k] = widened(from[(row + i) * depth + k]);
      }
    };
    if (weight.weight.is_accumulator) {
      widen(static_cast<const Acc*>(weight.weight.data));
    } else {
      widen(static_cast<const T*>(weight.weight.data));
    }
    if constexpr (Products<T>::pairs) {
      for (int64_t i = 0; i < rows; ++i) {
        wide[i * stride + depth] = 0;
        pair_columns(wide + i * stride, 2 * depth_of<T>(depth));
        copy_columns(1, depth_of<T>(depth), wide + i * stride, 0, out + i * weight.stride, 0);
      }
    }
  }
}

// `count` tokens from `first` on as rows of accumulators, zero behind the last of a vector.
template <typename T, typename Change, typename Acc = AccumulatorOf<T>>
void token_rows(const Tokens& tokens, int64_t first, int64_t count, int64_t channels,
    const Change& change, Acc* rows) {
  using V = typename Register<T>::type;
  const int64_t stride = padded(channels);
  for (int64_t i = 0; i < lanes; ++i) {
    Acc* row = rows + i * stride;
    if (i >= count) {
      for (int64_t c = 0; c < stride; c += V::size) V::zero().store(row + c);
      continue;
    }
    const T* from = static_cast<const T*>(tokens.data) + (first + i) * tokens.stride;
    for_each_register<V>(channels, [&](int64_t c, int64_t n) {
      change(load_part<V>(from + c, n), first + i, c, n).store(row + c);
    });
  }
}

// scale·x + shift.
template <typename V, typename Acc = typename V::Acc>
struct Affine {
  const Acc *scale, *shift;  // both or neither null

  V operator()(V x, int64_t, int64_t c, int64_t n) const {
    if (scale == nullptr) return x;
    return fma(load_part<V>(scale + c, n), x, load_part<V>(shift + c, n));
  }
};

// The factor of a token's image.
template <typename T, typename Acc = AccumulatorOf<T>>
Acc factor_of(const Parameter& factors, const MlpShape& shape, int64_t token) {
  return factors.data == nullptr ? Acc{1} : value_at<T, Acc>(factors, token / shape.image());
}

// The rows of a vector as columns of a right operand (channels, columns) in panels, from `column`
// on. `paired` is memory for as many rows, or the rows themselves if nothing needs them any more.
template <typename T, typename Acc = AccumulatorOf<T>>
void put_columns(
    const Acc* rows, int64_t channels, int64_t column, int64_t columns, Acc* paired, Acc* panels) {
  using V = typename Register<T>::type;
  const int64_t stride = padded(channels), depth = depth_of<T>(channels);
  if constexpr (Products<T>::pairs) {
    for (int64_t i = 0; i < lanes; ++i) {
      if (paired != rows) copy_columns(1, stride, rows + i * stride, 0, paired + i * stride, 0);
      pair_columns(paired + i * stride, 2 * depth);
    }
    rows = paired;
  }
  for (int64_t i = 0; i < lanes; i += V::size) {
    const Panel panel = panel_of<V>(column + i, columns);
    transpose(V::size, depth, rows + i * stride, stride,
        panels + panel.first * depth + column + i - panel.first, panel.columns);
  }
}

// Vectors of the next block where so many are left; no single one at the end.
inline int64_t next_vectors(int64_t left) {
  constexpr int64_t most = MlpLayout::block / lanes;
  return left == most + 1 ? most - 1 : smaller(left, most);
}

// Sums that begin as the bias of their row.
template <typename V, typename Acc = typename V::Acc>
struct FromBias {
  const Acc* bias;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V value = V::fill(bias[row + i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = value;
    }
  }
};

// Stores R rows of a tile as the right operand of another product over T's: `at(i, j)` is the value
// of row i and register j of columns.
template <typename V, typename T, int R, int N, typename At, typename Acc = typename V::Acc>
__attribute__((always_inline)) inline void store_panel(
    Acc* panels, int64_t depth, int64_t row, int64_t column, const At& at) {
  // Tiles and panels have the same columns.
  constexpr int64_t width = N * V::size;
  Acc* panel = panels + column * depth_of<T>(depth);
  if constexpr (Products<T>::pairs) {
    Acc* to = panel + row / 2 * width;
#pragma GCC unroll 8
    for (int i = 0; i < R; i += 2) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const V low = at(i, j), high = i + 1 < R ? at(i + 1, j) : V::zero();
        pair_of(low, high).store(to + i / 2 * width + j * V::size);
      }
    }
  } else {
    Acc* to = panel + row * width;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) at(i, j).store(to + i * width + j * V::size);
    }
  }
}

// c = begin + a · b for b in panels, summed in blocks of the depth: a sum in float stays short.
template <typename V, typename Product = Values, typename Begin, typename Acc = typename V::Acc>
inline void multiply_panels_in_blocks(int64_t rows, int64_t columns, int64_t depth,
    Matrix<const Acc> a, const Acc* b, const Begin& begin, Matrix<Acc> c) {
  constexpr int64_t block = 128;
  int64_t registers;
  for (int64_t j = 0; j < columns; j += registers * V::size) {
    registers = detail::next_registers((columns - j) / V::size);
    const int64_t width = registers * V::size;
    for (int64_t k = 0; k < depth; k += block) {
      const Matrix<const Acc> left{a.data + k, a.stride}, right{b + j * depth + k * width, width};
      const int64_t n = smaller(block, depth - k);
      if (k == 0) {
        detail::multiply_registers<false, Product, V>(
            registers, rows, left, right, n, j, begin, To<V>{c});
      } else {
        detail::multiply_registers<false, Product, V>(
            registers, rows, left, right, n, j, From<V>{}, AddedTo<V>{c, false});
      }
    }
  }
}

// Where the values of a hidden channel and a register of a block's tokens are kept.
template <typename V>
inline int64_t kept_index(int64_t vector, int64_t hidden, int64_t row, int64_t column) {
  return ((vector + column / lanes) * hidden + row) * lanes + column % lanes;
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
