// Products of tokens and a packed weight, for the instruction set of this compilation: tokens are
// rows of the left operand, where possible as they lie, and results leave the registers as rows of
// tokens.
#pragma once

#include <cstddef>

#include "attention_steps.h"
#include "packed_product.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Whether rows of `count` T's are rows of a left operand as they lie.
template <typename T>
constexpr bool is_left_operand(int64_t count) {
  return Products<T>::pairs ? count % 2 == 0 : sizeof(T) == sizeof(AccumulatorOf<T>);
}

// A row of T's as a row of a left operand.
template <typename T, typename Acc = AccumulatorOf<T>>
void stage(const T* from, int64_t count, Acc* to) {
  using V = typename Register<T>::type;
  if constexpr (Products<T>::pairs) {
    // A row of bfloat16 is a row of pairs.
    to[depth_of<T>(count) - 1] = 0;
    __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  } else {
    for_each_register<V>(
        count, [&](int64_t c, int64_t n) { load_part<V>(from + c, n).store(to + c); });
  }
}

// A register of outputs from `output` on as columns of the packed operand, zero behind the last.
// `rows` is memory for V::size rows of padded(count + 1).
template <typename T, typename Acc = AccumulatorOf<T>>
void pack_columns(const WeightPacking& of, int64_t output, Acc* rows) {
  using V = typename Register<T>::type;
  const int64_t stride = of.stride, count = of.count, depth = depth_of<T>(count);
  const Panel panel = panel_of<V>(output, padded(of.outputs));
  const int64_t inside = output < of.outputs ? smaller(V::size, of.outputs - output) : 0;
  Acc* to = static_cast<Acc*>(of.packed) + panel.first * depth + output - panel.first;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = inside; j < V::size; ++j) to[k * panel.columns + j] = 0;
  }
  if (inside == 0) return;
  const int64_t first = output * stride + of.offset;
  if constexpr (Products<T>::pairs) {
    for (int64_t j = 0; j < inside; ++j) {
      Acc* row = rows + j * padded(count + 1);
      if (of.weight.is_accumulator) {
        const Acc* from = static_cast<const Acc*>(of.weight.data) + first + j * stride;
        copy_columns(1, count, from, count, row, count);
        row[count] = 0;
        pair_columns(row, 2 * depth);
      } else {
        stage(static_cast<const T*>(of.weight.data) + first + j * stride, count, row);
      }
    }
    transpose(inside, depth, rows, padded(count + 1), to, panel.columns);
  } else if (of.weight.is_accumulator) {
    const Acc* from = static_cast<const Acc*>(of.weight.data) + first;
    transpose(inside, count, from, stride, to, panel.columns);
  } else {
    const T* from = static_cast<const T*>(of.weight.data) + first;
    transpose(inside, count, from, stride, to, panel.columns);
  }
}

template <typename T>
void pack_weight(const WeightPacking& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  Acc* bias = static_cast<Acc*>(args.bias_row);
  for (int64_t output = begin * lanes; output < end * lanes; output += V::size) {
    pack_columns<T>(args, output, static_cast<Acc*>(memory));
    if (bias == nullptr) continue;
    for (int64_t c = output; c < output + V::size; ++c) {
      const bool present = c < args.outputs && args.bias.data != nullptr;
      bias[c] = present ? value_at<T, Acc>(args.bias, c) : Acc{0};
    }
  }
}

// Calls body(first, count, from, to) for these tasks: tokens and, of the product's columns in
// panels, a range.
template <typename V, typename Body>
void for_each_product(const ProductTasks& tasks, int64_t tokens, int64_t columns, int64_t begin,
    int64_t end, const Body& body) {
  int64_t panels = 0;
  for (int64_t j = 0; j < columns; j = panel_end<V>(j, columns)) ++panels;
  int64_t panel = 0, column = 0;
  const auto column_of = [&](int64_t wanted) {
    for (; panel < wanted; ++panel) column = panel_end<V>(column, columns);
    return column;
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / tasks.blocks, first = task % tasks.blocks * tasks.block;
    panel = column = 0;
    const int64_t from = column_of(group * panels / tasks.groups);
    const int64_t to = column_of((group + 1) * panels / tasks.groups);
    body(first, smaller(tasks.block, tokens - first), from, to);
  }
}

// Sums of tokens end with a factor and a residual, as stored.
template <typename V, typename T>
struct Finished {
  typename V::Acc factor;
  const T* residual;  // may be null
  int64_t residual_stride;
  T* out;
  int64_t channels;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t token, int64_t column) const {
    const V scale = V::fill(factor);
    const bool whole = column + N * V::size <= channels;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      T* to = out + (token + i) * channels + column;
      const T* from =
          residual == nullptr ? nullptr : residual + (token + i) * residual_stride + column;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const int64_t c = j * V::size;
        if (whole) {
          const V result =
              residual == nullptr ? scale * sums[i][j] : fma(scale, sums[i][j], V::load(from + c));
          result.store(to + c);
        } else if (column + c < channels) {
          const int64_t n = smaller(V::size, channels - column - c);
          const V result = residual == nullptr ? scale * sums[i][j]
                                               : fma(scale, sums[i][j], V::load(from + c, n));
          result.store(to + c, n);
        }
      }
    }
  }
};

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
