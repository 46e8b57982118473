// Gradients of weights: products summed over tokens, for the instruction set of this compilation.
#pragma once

#include "matmul.h"
#include "parts.h"
#include "scratch.h"
#include "token_product.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// sums (rows) += Σ weight·left of some tokens, short sums in float added in double.
template <typename V, typename Acc = typename V::Acc>
inline void add_rows(const Acc* left, int64_t stride, int64_t rows, int64_t tokens,
    const Acc* weights, double* sums) {
  constexpr int64_t block = 32;
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t last = smaller(first + block, tokens);
    for_each_register<V>(rows, [&](int64_t row, int64_t n) {
      V sum = V::zero();
      for (int64_t t = first; t < last; ++t) {
        const V value = load_part<V>(left + t * stride + row, n);
        sum = weights == nullptr ? sum + value : fma(value, V::fill(weights[t]), sum);
      }
      Acc parts[V::size];
      sum.store(parts);
      for (int64_t i = 0; i < n; ++i) sums[row + i] += static_cast<double>(parts[i]);
    });
  }
}

// A task is a block of rows: all tokens, some at a time, so that sums in float stay short.
template <typename T>
void token_product(const TokenProduct& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  constexpr int64_t block = TokenProduct::row_block;
  const int64_t width = padded(args.columns);
  const bool widens = args.left_is_stored && sizeof(T) < sizeof(Acc);
  Scratch<Acc> scratch(memory);
  Acc* wide = scratch.take(TokenProduct::depth * block);
  Acc* sums = scratch.take(block * width);
  const Acc factor = static_cast<Acc>(args.factor);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task * block, rows = smaller(block, args.rows - row);
    double row_sums[block] = {};
    for (int64_t first = 0; first < args.tokens; first += TokenProduct::depth) {
      const int64_t depth = smaller(TokenProduct::depth, args.tokens - first);
      const int64_t offset = first * args.left_stride + row;
      Matrix<const Acc> left{static_cast<const Acc*>(args.left) + offset, args.left_stride};
      if (widens) {
        const T* from = static_cast<const T*>(args.left) + offset;
        for (int64_t t = 0; t < depth; ++t) {
          for (int64_t i = 0; i < rows; ++i) {
            wide[t * block + i] = static_cast<Acc>(widened(from[t * args.left_stride + i]));
          }
        }
        left = {wide, block};
      }
      if (args.sums != nullptr) {
        const Acc* weights = static_cast<const Acc*>(args.weights);
        add_rows<V>(left.data, left.stride, rows, depth,
            weights == nullptr ? nullptr : weights + first, row_sums);
      }
      const Acc* right = static_cast<const Acc*>(args.right) + first * args.right_stride;
      multiply_with<true, V>(rows, width, depth, left, {right, args.right_stride}, From<V>{},
          AddedTo<V>{{sums, width}, first == 0});
    }
    Acc* out = static_cast<Acc*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < args.columns; ++c) {
        out[i * args.out_stride + c] = factor * sums[i * width + c];
      }
    }
    for (int64_t i = 0; args.sums != nullptr && i < rows; ++i) {
      static_cast<Acc*>(args.sums)[row + i] = static_cast<Acc>(args.factor * row_sums[i]);
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
