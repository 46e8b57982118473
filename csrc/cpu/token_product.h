// Gradients of weights: products summed over tokens, for the instruction set of this compilation.
#pragma once

#include "co_attention.h"
#include "matmul.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// A task is a block of rows: all tokens, some at a time, so that sums in float stay short.
template <typename T>
void token_product(const TokenProduct& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  constexpr int64_t block = TokenProduct::row_block;
  const int64_t width = padded(args.columns);
  Scratch<Acc> scratch(memory);
  Acc* left = scratch.take(TokenProduct::depth * block);
  Acc* sums = scratch.take(block * width);
  const Acc factor = static_cast<Acc>(args.factor);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task * block, rows = smaller(block, args.rows - row);
    double row_sums[block] = {};
    for (int64_t first = 0; first < args.tokens; first += TokenProduct::depth) {
      const int64_t depth = smaller(TokenProduct::depth, args.tokens - first);
      const Acc* weights = static_cast<const Acc*>(args.weights);
      const auto copy = [&](const auto* from) {
        from += first * args.left_stride + row;
        for (int64_t t0 = 0; t0 < depth; t0 += 32) {
          Acc short_sums[block] = {};
          for (int64_t t = t0; t < smaller(t0 + 32, depth); ++t) {
            const Acc weight = weights == nullptr ? Acc{1} : weights[first + t];
            for (int64_t i = 0; i < rows; ++i) {
              const Acc value = static_cast<Acc>(widened(from[t * args.left_stride + i])) * factor;
              left[t * block + i] = value;
              short_sums[i] += value * weight;
            }
          }
          for (int64_t i = 0; i < rows; ++i) row_sums[i] += static_cast<double>(short_sums[i]);
        }
      };
      if (args.left_is_stored) {
        copy(static_cast<const T*>(args.left));
      } else {
        copy(static_cast<const Acc*>(args.left));
      }
      const Acc* right = static_cast<const Acc*>(args.right) + first * args.right_stride;
      multiply_with<true, V>(rows, width, depth, {left, block}, {right, args.right_stride},
          From<V>{}, AddedTo<V>{{sums, width}, first == 0});
    }
    copy_columns(rows, args.columns, sums, width,
        static_cast<Acc*>(args.out) + row * args.out_stride, args.out_stride);
    for (int64_t i = 0; args.sums != nullptr && i < rows; ++i) {
      static_cast<Acc*>(args.sums)[row + i] = static_cast<Acc>(row_sums[i]);
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
