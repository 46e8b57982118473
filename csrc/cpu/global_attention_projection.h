// What forward and backward of global self-attention share: LayerNorm and projection.
#pragma once

#include "attention_steps.h"
#include "global_attention.h"
#include "scratch.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// A call's memory with its types.
template <typename T>
struct Call {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const AttentionProjection& args;
  const AttentionShape& shape;
  AttentionLayout layout;
  Acc scale;

  explicit Call(const AttentionProjection& a)
      : args(a),
        shape(a.shape),
        layout(a.shape),
        scale(Acc{1} / square_root(static_cast<Acc>(a.shape.head_dim))) {}

  Acc* packed() const { return static_cast<Acc*>(args.packed); }
  Acc* packed_head(int64_t head) const {
    return packed() + 2 * layout.width + head * layout.packed_head;
  }
  const T* x(int64_t image, int64_t token) const {
    return static_cast<const T*>(args.x) + (image * shape.tokens + token) * shape.width();
  }
};

// Task h packs the norm, task `head` the weights of that head.
template <typename T>
void pack(const AttentionProjection& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Call<T> call(args);
  const AttentionShape& shape = args.shape;
  const int64_t C = shape.width(), d = shape.head_dim, stride = call.layout.head;
  const int64_t depth = depth_of<T>(C);
  for (int64_t task = begin; task < end; ++task) {
    if (task == shape.heads) {
      Acc* weight = call.packed();
      Acc* bias = weight + call.layout.width;
      for (int64_t c = 0; c < call.layout.width; ++c) {
        weight[c] = c < C ? value_at<T, Acc>(args.norm_weight, c) : Acc{0};
        bias[c] = c < C ? value_at<T, Acc>(args.norm_bias, c) : Acc{0};
      }
      continue;
    }
    Acc* bias = call.packed_head(task);
    Acc* panel = bias + stride;
    const auto source_row = [&](int64_t column) { return column / d * C + task * d + column % d; };
    for (int64_t j = 0; j < stride; ++j) {
      bias[j] = j < 3 * d ? value_at<T, Acc>(args.qkv_bias, source_row(j)) : Acc{0};
    }
    for (int64_t first = 0; first < stride; first += tile_columns<V>) {
      const int64_t columns = smaller(tile_columns<V>, stride - first);
      // In runs of rows that follow one another in the source.
      for (int64_t j = 0; j < columns;) {
        const int64_t column = first + j;
        if (column >= 3 * d) {
          for (int64_t k = 0; k < depth; ++k) {
            for (int64_t i = j; i < columns; ++i) panel[k * columns + i] = 0;
          }
          break;
        }
        const int64_t run = smaller(columns - j, d - column % d);
        const int64_t offset = source_row(column) * C;
        if (!args.qkv_weight.is_accumulator) {
          const T* rows = static_cast<const T*>(args.qkv_weight.data) + offset;
          if constexpr (Products<T>::pairs) {
            // Rows of bfloat16 are rows of pairs.
            const float* words = reinterpret_cast<const float*>(rows);
            transpose(run, C / 2, words, C / 2, panel + j, columns);
          } else {
            transpose(run, C, rows, C, panel + j, columns);
          }
        } else {
          const Acc* rows = static_cast<const Acc*>(args.qkv_weight.data) + offset;
          if constexpr (Products<T>::pairs) {
            Acc* row = static_cast<Acc*>(memory);
            for (int64_t i = 0; i < run; ++i) {
              copy_columns(1, C, rows + i * C, C, row, C);
              pair_columns(row, C);
              for (int64_t k = 0; k < C / 2; ++k) panel[k * columns + j + i] = row[k];
            }
          } else {
            transpose(run, C, rows, C, panel + j, columns);
          }
        }
        j += run;
      }
      panel += depth * columns;
    }
  }
}

// y (count, layout.width) = LayerNorm of an image's tokens from `first` on; with their moments
// where `kept` is not null.
template <typename T>
void normalise_tokens(const Call<T>& call, int64_t image, int64_t first, int64_t count,
    AccumulatorOf<T>* y, Moments<AccumulatorOf<T>>* kept = nullptr) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t C = call.shape.width(), stride = call.layout.width;
  const Acc* weight = call.packed();
  const Acc* bias = weight + stride;
  const T* x = call.x(image, first);
  const auto tokens = [&](auto rows, int64_t i) {
    constexpr int R = decltype(rows)::value;
    Moments<Acc> moments[R];
    moments_of<V, R>(x + i * C, C, C, static_cast<Acc>(call.args.eps), moments);
    for (int r = 0; r < R; ++r) {
      normalise<V>(x + (i + r) * C, C, stride, moments[r], weight, bias, y + (i + r) * stride);
      if constexpr (Products<T>::pairs) pair_columns(y + (i + r) * stride, C);
      if (kept != nullptr) kept[i + r] = moments[r];
    }
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) tokens(Constant<4>{}, i);
  for (; i < count; ++i) tokens(Constant<1>{}, i);
}

// [Q, K, V] of one head for `count` normalised tokens, an even number but for the last.
template <typename T>
void project_head(const Call<T>& call, int64_t head, int64_t count, const AccumulatorOf<T>* y,
    AccumulatorOf<T>* qkv) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t depth = depth_of<T>(call.shape.width()), stride = call.layout.head;
  const Acc* bias = call.packed_head(head);
  const Acc* panel = bias + stride;
  for (int64_t first = 0; first < stride; first += tile_columns<V>) {
    const int64_t columns = smaller(tile_columns<V>, stride - first);
    multiply<false, V, typename Products<T>::type>(count, columns, depth, {y, call.layout.width},
        {panel, columns}, {bias + first, 0}, {qkv + first, stride});
    panel += depth * columns;
  }
  if constexpr (Products<T>::pairs) {
    // Along the channels of Q and K, along the tokens of V.
    const int64_t d = call.shape.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      Acc* row = qkv + i * stride;
      pair_columns(row, d);
      pair_columns(row + d, d);
      if (i % 2 == 0) {
        Acc* next = i + 1 < count ? row + stride + 2 * d : nullptr;
        pair_rows(row + 2 * d, next, call.layout.dim);
      }
    }
  }
}

// Zeroes keys behind the last token, so that their scores are finite.
template <typename T>
void clear_padding(const Call<T>& call, AccumulatorOf<T>* keys) {
  for (int64_t k = 0; k < call.shape.head_dim; ++k) {
    for (int64_t j = call.shape.tokens; j < call.layout.keys; ++j) {
      keys[k * call.layout.keys + j] = 0;
    }
  }
}

// Where the matrices of a head lie, with many tokens.
template <typename T>
AccumulatorOf<T>* of_head(
    const Call<T>& call, void* memory, int64_t image, int64_t head, int64_t size) {
  return static_cast<AccumulatorOf<T>*>(memory) + (image * call.shape.heads + head) * size;
}
template <typename T>
AccumulatorOf<T>* qkv_of(const Call<T>& call, int64_t image, int64_t head) {
  return of_head(call, call.args.qkv, image, head, call.shape.tokens * call.layout.head);
}
template <typename T>
AccumulatorOf<T>* transposed_of(const Call<T>& call, void* memory, int64_t image, int64_t head) {
  return of_head(call, memory, image, head, call.shape.head_dim * call.layout.keys);
}

// Normalises a block of tokens and, with memory for it, projects all its heads.
template <typename T>
void project(const AttentionProjection& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const Call<T> call(args);
  const AttentionLayout& layout = call.layout;
  const int64_t M = args.shape.tokens, d = args.shape.head_dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / layout.token_blocks;
    const int64_t first = task % layout.token_blocks * AttentionLayout::token_block;
    const int64_t count = smaller(AttentionLayout::token_block, M - first);
    const int64_t row = image * M + first;
    Acc* y = static_cast<Acc*>(memory);
    Moments<Acc>* moments = nullptr;
    if (args.y != nullptr) {
      y = static_cast<Acc*>(args.y) + row * layout.width;
      moments = static_cast<Moments<Acc>*>(args.moments) + row;
    }
    normalise_tokens(call, image, first, count, y, moments);
    if (args.qkv == nullptr) continue;
    for (int64_t head = 0; head < args.shape.heads; ++head) {
      Acc* qkv = qkv_of(call, image, head) + first * layout.head;
      project_head(call, head, count, y, qkv);
      for (int part = 1; part < (args.values == nullptr ? 2 : 3); ++part) {
        void* all = part == 1 ? args.keys : args.values;
        Acc* transposed = transposed_of(call, all, image, head);
        transpose(
            count, depth_of<T>(d), qkv + part * d, layout.head, transposed + first, layout.keys);
        if (first + count == M) clear_padding(call, transposed);
      }
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
