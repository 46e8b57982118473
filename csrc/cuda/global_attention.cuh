// Self-attention among the global tokens on the GPU: forward. To be included by one translation
// unit.
//
// A warp owns 16 queries. Where all keys fit one tile, a block does everything for one head of one
// image; else one kernel projects the tokens to Q, K and V, and another goes over tiles of keys
// with an online softmax.
#pragma once

#include <cmath>

#include "cuda/global_attention_tiles.cuh"

namespace dsnet::cuda {

// Softmax and weighted values of a warp's 16 queries, tile of keys by tile of keys.
template <typename T, int head_tile, int tile>
class OnlineSoftmax {
 public:
  // `scale` is that of the logits.
  DSNET_DEVICE explicit OnlineSoftmax(float scale) : scale_(scale), scale2_(scale * log2_e) {}

  // Of the tile's rows, the first `keys` are real.
  DSNET_DEVICE void add(const LeftRows<T, head_tile>& queries, const T* key_tile,
      const T* value_tile, int keys, const DropoutMask& mask, int first_query, int first_key) {
    constexpr int tiles = tile / 8;
    const int used = keys < tile ? (keys + 7) / 8 : tiles;
    float weights[tiles][4] = {}, correction[2];
    multiply_transposed(queries, key_tile, used, weights);
    weigh(weights, keys, correction);
    if (mask.is_active()) mask.apply(mask.kept_of_queries<tiles>(first_query, first_key), weights);
    accumulate(weights, value_tile, used);
  }

  // The logits of a tile's first `keys` keys become weights, those of the others zero. What was
  // summed before has been multiplied by `correction`.
  DSNET_DEVICE void weigh(float (&weights)[tile / 8][4], int keys, float (&correction)[2]) {
    constexpr int tiles = tile / 8;
    const int lane = lane_id();
    // The maximum is over real keys only.
    if (keys < tile) {
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * t + lane % 4 * 2 + i % 2 >= keys) weights[t][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = max_[half];
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        max = fmaxf(max, fmaxf(weights[t][2 * half], weights[t][2 * half + 1]));
      }
      max = warp_max(max, 4);
      // Logits that are all minus infinity so far: of these, none may become NaN.
      const float offset = max == -INFINITY ? 0.0f : binary_units(max);
      correction[half] = exp2_approx(binary_units(max_[half]) - offset);
      max_[half] = max;
      sum_[half] *= correction[half];
#pragma unroll
      for (int t = 0; t < head_tile / 8; ++t) {
        out_[t][2 * half] *= correction[half];
        out_[t][2 * half + 1] *= correction[half];
      }
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          weights[t][i] = exp2_approx(fmaf(weights[t][i], scale2_, -offset));
          sum_[half] += weights[t][i];
        }
      }
    }
  }

  // Adds the weighted values of the tile's first `used` groups of eight.
  DSNET_DEVICE void accumulate(const float (&weights)[tile / 8][4], const T* value_tile, int used) {
    multiply_result<T>(weights, value_tile, used, out_);
  }

  // Of row lane/4 + 8·half: the maximum of the logits, and after the last tile the sum of the
  // weights relative to it; the weighted values, not yet divided by that.
  DSNET_DEVICE float max(int half) const { return max_[half] * scale_; }
  DSNET_DEVICE float sum(int half) const { return warp_sum(sum_[half], 4); }
  DSNET_DEVICE const float (&out() const)[head_tile / 8][4] { return out_; }

  // Adds x of the head's columns, and writes these and the sums' logarithms; `rows` tokens are
  // real.
  DSNET_DEVICE void finish(
      const T* x, T* out, float* lse, int64_t stride, int rows, int columns, bool packed) {
    const int lane = lane_id();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const float sum = this->sum(half), inverse = 1.0f / sum;
#pragma unroll
      for (int group = 0; group < head_tile / 32; ++group) {
        float values[8];
        gather_row(out_, 4 * group, half, values);
        const int column = 32 * group + lane % 4 * 8;
        if (row >= rows || column >= columns) continue;
        float residual[8];
        load_values(x + row * stride + column, packed, residual);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = fmaf(values[i], inverse, residual[i]);
        store_eight(out + row * stride + column, values);
      }
      if (row < rows && lane % 4 == 0) {
        store_global(lse + row, max(half) + logf(sum));
      }
    }
  }

 private:
  // The same number for the same maximum: the correction of an unchanged maximum is exactly 1.
  DSNET_DEVICE float binary_units(float max) const {
    return multiply_rounded(max * scale_, log2_e);
  }

  float scale_, scale2_;  // of logits, in natural and binary units
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
  float out_[head_tile / 8][4] = {};
};

DSNET_DEVICE float logit_scale(const AttentionShape& shape) {
  return 1.0f / sqrtf(static_cast<float>(shape.head_dim));
}

// One head of one image, M ≤ 64 tokens and d ≤ 32.
template <typename T>
__global__ void __launch_bounds__(128, 3)
    global_attention_fused(const AttentionForward args, const AttentionLaunch l) {
  constexpr int head_tile = 32, stride = row_stride<T, head_tile>;
  const AttentionShape& shape = args.shape;
  const HeadPlace place(shape, 1, blockIdx.x);
  const int tokens = static_cast<int>(shape.tokens), head_dim = static_cast<int>(shape.head_dim);
  const int channels = static_cast<int>(shape.width);
  const int lane = lane_id(), block_rows = static_cast<int>(blockDim.x / 2);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * AttentionLaunch::warp_rows;
  const int64_t first = (place.image * tokens + warp_row) * channels;
  const T* x = static_cast<const T*>(args.inputs.x) + first;
  T* shared = dynamic_shared<T>();

  float qkv[3 * head_tile / 8][4] = {};
  NormalizedRows<T> rows(args.inputs, x, tokens - warp_row, channels, l.packed);
  project<T, 3 * head_tile>(
      rows, args.inputs, channels, l.packed, shared, nullptr,
      [&](int n) {
        const int column = n % head_tile;
        return column < head_dim ? n / head_tile * channels + place.head * head_dim + column : -1;
      },
      qkv);

  // Q, K and V of all tokens, zero behind the last one.
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 3 * head_tile / 8; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + lane / 4 + 8 * half, part = t / (head_tile / 8);
      float pair[2] = {qkv[t][2 * half], qkv[t][2 * half + 1]};
      if (row >= tokens) pair[0] = pair[1] = 0;
      const int column = t % (head_tile / 8) * 8 + lane % 4 * 2;
      store_shared(shared + (part * block_rows + row) * stride + column, narrow<T>(pair));
    }
  }
  __syncthreads();

  const T* keys = shared + block_rows * stride;
  const DropoutMask mask(args.inputs.dropout, place);
  OnlineSoftmax<T, head_tile, 64> softmax(logit_scale(shape));
  softmax.add(LeftRows<T, head_tile>(shared + warp_row * stride), keys, keys + block_rows * stride,
      tokens, mask, warp_row, 0);
  const int64_t column = place.head * head_dim;
  softmax.finish(x + column, static_cast<T*>(args.out) + first + column,
      args.lse + (place.image * shape.heads + place.head) * tokens + warp_row, channels,
      tokens - warp_row, head_dim, l.packed);
}

// 64 tokens and 96 of the 3·C columns of Q, K and V; also LayerNorm and statistics unless null.
template <typename T>
__global__ void __launch_bounds__(128, 3)
    global_attention_project(const AttentionShape shape, const AttentionInputs inputs,
        const AttentionLaunch l, T* qkv, T* normalized, float* statistics) {
  constexpr int block_columns = AttentionLaunch::block_columns;
  const int channels = static_cast<int>(shape.width), lane = lane_id();
  const auto columns = static_cast<unsigned>(l.column_blocks);
  const int first_column = static_cast<int>(blockIdx.x % columns) * block_columns;
  const int64_t first_row = int64_t{blockIdx.x / columns} * AttentionLaunch::block_rows +
                            threadIdx.x / 32 * AttentionLaunch::warp_rows;
  const int64_t rows_left = shape.batch * shape.tokens - first_row;
  // Each token's LayerNorm is written by the blocks of the first columns.
  const bool is_first = first_column == 0 && normalized != nullptr && rows_left > 0;

  float result[block_columns / 8][4] = {};
  NormalizedRows<T> rows(inputs, static_cast<const T*>(inputs.x) + first_row * channels, rows_left,
      channels, l.packed);
  project<T, block_columns>(
      rows, inputs, channels, l.packed, dynamic_shared<T>(),
      is_first ? normalized + first_row * channels : nullptr,
      [&](int n) { return first_column + n < 3 * channels ? first_column + n : -1; }, result);
  if (is_first) rows.store_statistics(statistics + 2 * first_row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < block_columns / 32; ++group) {
      float values[8];
      gather_row(result, 4 * group, half, values);
      const int column = first_column + 32 * group + lane % 4 * 8;
      if (row >= rows_left || column >= 3 * channels) continue;
      store_eight(qkv + (first_row + row) * 3 * channels + column, values);
    }
  }
}

// Blocks that share a multiprocessor, by the registers that they take without spills.
template <int head_tile>
constexpr int forward_attention_blocks = head_tile > 64   ? 3
                                         : head_tile > 32 ? 4
                                                          : 5;

// 64 queries of one head.
template <typename T, int head_tile>
__global__ void __launch_bounds__(128, forward_attention_blocks<head_tile>)
    global_attention_forward(const AttentionForward args, const AttentionLaunch l) {
  constexpr int tile = tile_rows<T, head_tile>, stride = row_stride<T, head_tile>;
  const AttentionShape& shape = args.shape;
  const HeadPlace place(shape, l.row_tiles, blockIdx.x);
  const int tokens = static_cast<int>(shape.tokens), head_dim = static_cast<int>(shape.head_dim);
  const int64_t channels = shape.width;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * AttentionLaunch::warp_rows;
  const int first_query = place.first_row + warp_row;
  const T* q = static_cast<const T*>(args.qkv) + place.image * tokens * 3 * channels +
               int64_t{place.head} * head_dim;
  T* shared = dynamic_shared<T>();
  copy_rows<T, head_tile>(shared, q + place.first_row * 3 * channels, 3 * channels,
      AttentionLaunch::block_rows, tokens - place.first_row, head_dim, true);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const LeftRows<T, head_tile> queries(shared + warp_row * stride);
  const DropoutMask mask(args.inputs.dropout, place);
  OnlineSoftmax<T, head_tile, tile> softmax(logit_scale(shape));
  const KeyTiles<T, head_tile> tiles{
      q, shared + AttentionLaunch::block_rows * stride, tokens, head_dim, channels};
  for_each_tile<2>(tiles.count(), tiles, [&](int i, int stage) {
    const int first_key = i * tile;
    softmax.add(queries, tiles.keys(stage), tiles.values(stage), tokens - first_key, mask,
        first_query, first_key);
  });
  const int64_t at = (place.image * tokens + first_query) * channels + place.head * head_dim;
  softmax.finish(static_cast<const T*>(args.inputs.x) + at, static_cast<T*>(args.out) + at,
      args.lse + (place.image * shape.heads + place.head) * tokens + first_query, channels,
      tokens - first_query, head_dim, l.packed);
}

// Calls body(std::integral_constant of the head tile).
template <typename Body>
void with_head_tile(int head_tile, const Body& body) {
  switch (head_tile) {
    case 32: return body(std::integral_constant<int, 32>{});
    case 64: return body(std::integral_constant<int, 64>{});
    default: return body(std::integral_constant<int, 128>{});
  }
}

template <typename T>
void launch_projection(const AttentionShape& shape, const AttentionInputs& inputs,
    const AttentionLaunch& l, void* qkv, void* normalized, float* statistics, cudaStream_t stream) {
  const Grid grid{dim3{static_cast<unsigned>(l.projection_blocks())}, dim3{128},
      projection_bytes<AttentionLaunch::block_columns>(AttentionLaunch::block_rows)};
  launch("global_attention_project", global_attention_project<T>, grid, stream, shape, inputs, l,
      static_cast<T*>(qkv), static_cast<T*>(normalized), statistics);
}

// Compiled by global_attention.cu.
#define DSNET_ATTENTION_PROJECTION(declared, T)                                              \
  declared template void launch_projection<T>(const AttentionShape&, const AttentionInputs&, \
      const AttentionLaunch&, void*, void*, float*, cudaStream_t)

DSNET_ATTENTION_PROJECTION(extern, float);
DSNET_ATTENTION_PROJECTION(extern, __nv_bfloat16);
DSNET_ATTENTION_PROJECTION(extern, __half);

}  // namespace dsnet::cuda
