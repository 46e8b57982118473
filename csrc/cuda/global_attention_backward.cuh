// Self-attention among the global tokens on the GPU: backward. To be included by one translation
// unit.
//
// With logits s, weights P = exp(s − lse), kept and scaled to P' by dropout, and dO the output's
// gradient, one head's gradients are
//   dP = dropout(dO·Vᵀ)   δ_i = Σ_j P_ij·dP_ij   dS = P∘(dP − δ)
//   dQ = dS·K/√d          dK = dSᵀ·Q/√d          dV = P'ᵀ·dO
// One kernel has warps own 16 queries each (δ, then dQ), another 16 keys each (dK and dV).
#pragma once

#include "cuda/global_attention.cuh"
#include "cuda/sum_slots.h"

namespace dsnet::cuda {

// Pairs of tiles under way: as many as 99 KB of shared memory hold for every head dimension.
template <typename T>
constexpr int backward_stages = sizeof(T) == 2 ? 2 : 1;

// In float32, weights are divided by their sum once more: the rounding of lse, one factor for all
// weights of a query, would be the largest error of all.
template <typename T>
constexpr bool is_renormalized = sizeof(T) == 4;

// Columns of one head of a warp's 16 rows to (…, stride), scaled.
template <typename T, int tiles>
DSNET_DEVICE void store_rows(
    const float (&result)[tiles][4], float scale, T* out, int64_t stride, int rows, int columns) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < tiles / 4; ++group) {
      float values[8];
      gather_row(result, 4 * group, half, values);
      const int column = 32 * group + lane % 4 * 8;
      if (row >= rows || column >= columns) continue;
#pragma unroll
      for (float& value : values) value *= scale;
      store_eight(out + row * stride + column, values);
    }
  }
}

// Blocks that share a multiprocessor, by the registers that they take without spills.
constexpr int query_blocks = 3;
template <typename T, int head_tile>
constexpr int key_blocks = head_tile > 32 || sizeof(T) == 4 ? 2 : 3;

// δ and dQ of 64 queries of one head.
template <typename T, int head_tile>
__global__ void __launch_bounds__(128, query_blocks)
    global_attention_backward_queries(const AttentionBackward args, const AttentionLaunch l) {
  constexpr int tile = tile_rows<T, head_tile>, tiles = tile / 8;
  constexpr int matrix_values = AttentionLaunch::block_rows * row_stride<T, head_tile>;
  const AttentionShape& shape = args.shape;
  const HeadPlace place(shape, l.row_tiles, blockIdx.x);
  const int tokens = static_cast<int>(shape.tokens), head_dim = static_cast<int>(shape.head_dim);
  const int64_t channels = shape.width, column = int64_t{place.head} * head_dim;
  const int lane = lane_id();
  const int warp_row = static_cast<int>(threadIdx.x / 32) * AttentionLaunch::warp_rows;
  const int first_query = place.first_row + warp_row, rows_left = tokens - place.first_row;
  const int64_t first_token = place.image * tokens;
  const T* q = static_cast<const T*>(args.qkv) + first_token * 3 * channels + column;
  const T* grad = static_cast<const T*>(args.grad) + first_token * channels + column;
  T* shared = dynamic_shared<T>();
  copy_rows<T, head_tile>(shared, q + place.first_row * 3 * channels, 3 * channels,
      AttentionLaunch::block_rows, rows_left, head_dim, true);
  copy_rows<T, head_tile>(shared + matrix_values, grad + place.first_row * channels, channels,
      AttentionLaunch::block_rows, rows_left, head_dim, l.packed);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const T* own = shared + warp_row * row_stride<T, head_tile>;
  const LeftRows<T, head_tile> queries(own), grads(own + matrix_values);
  const DropoutMask mask(args.inputs.dropout, place);
  const float scale = logit_scale(shape), scale2 = scale * log2_e;
  const int64_t sums = (place.image * shape.heads + place.head) * tokens + first_query;
  const int64_t all_sums = shape.batch * shape.heads * tokens;
  float lse2[2] = {}, delta[2] = {}, weights[2] = {}, inverse[2] = {1, 1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    if (first_query + row < tokens) lse2[half] = load_global<float>(args.lse + sums + row) * log2_e;
  }
  const KeyTiles<T, head_tile> key_tiles{q, shared + 2 * matrix_values, tokens, head_dim, channels};
  // P and dP of a tile of keys, zero behind the last key: there exp(0 − lse) may be infinite.
  const auto score = [&](int i, int stage, float (&p)[tiles][4], float (&dp)[tiles][4]) {
    const int keys = tokens - i * tile, used = keys < tile ? (keys + 7) / 8 : tiles;
    multiply_transposed(queries, key_tiles.keys(stage), used, p);
    multiply_transposed(grads, key_tiles.values(stage), used, dp);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_real = 8 * t + lane % 4 * 2 + k % 2 < keys;
        const float weight = exp2_approx(fmaf(p[t][k], scale2, -lse2[k / 2]));
        p[t][k] = is_real ? weight : 0.0f;
      }
    }
    if (mask.is_active()) mask.apply(mask.kept_of_queries<tiles>(first_query, i * tile), dp);
    return used;
  };

  for_each_tile<backward_stages<T>>(key_tiles.count(), key_tiles, [&](int i, int stage) {
    float p[tiles][4] = {}, dp[tiles][4] = {};
    score(i, stage, p, dp);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        delta[k / 2] = fmaf(p[t][k], dp[t][k], delta[k / 2]);
        if (is_renormalized<T>) weights[k / 2] += p[t][k];
      }
    }
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (is_renormalized<T>) inverse[half] = 1.0f / warp_sum(weights[half], 4);
    delta[half] = warp_sum(delta[half], 4) * inverse[half];
    const int row = lane / 4 + 8 * half;
    if (first_query + row < tokens && lane % 4 == 0) {
      store_global(args.row_sums + sums + row, delta[half]);
      store_global(args.row_sums + all_sums + sums + row, inverse[half]);
    }
  }

  float grad_q[head_tile / 8][4] = {};
  for_each_tile<backward_stages<T>>(key_tiles.count(), key_tiles, [&](int i, int stage) {
    float p[tiles][4] = {}, dp[tiles][4] = {};
    const int used = score(i, stage, p, dp);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) p[t][k] *= (dp[t][k] - delta[k / 2]) * inverse[k / 2];
    }
    multiply_result<T>(p, key_tiles.keys(stage), used, grad_q);
  });
  T* out = static_cast<T*>(args.grad_qkv) + (first_token + first_query) * 3 * channels + column;
  store_rows(grad_q, scale, out, 3 * channels, tokens - first_query, head_dim);
}

// Queries at a time in the keys' kernel: two score matrices beside two sums in registers.
template <typename T, int head_tile>
constexpr int query_rows = sizeof(T) == 4 && head_tile > 32 ? 16 : 32;

// Blocks between which dK and dV of the same keys are shared.
template <int head_tile>
constexpr int key_parts = head_tile > 64 ? 2 : 1;

// Tiles of dO and Q of one head, with what is known of each query.
template <typename T, int head_tile>
struct QueryTiles {
  static constexpr int tile = query_rows<T, head_tile>;
  static constexpr int tile_values = tile * row_stride<T, head_tile>;
  static constexpr int vectors_of_tile = is_renormalized<T> ? 3 : 2;
  static constexpr size_t vector_bytes =
      backward_stages<T> * vectors_of_tile * tile * sizeof(float);
  const T* grad_rows;      // the head's columns of the image's first token in (B, M, C)
  const T* q;              // the same in (B, M, 3·C)
  const float* vector[3];  // lse, δ and 1 / Σ P, of the head's first query
  T* shared;
  int tokens, head_dim;
  int64_t channels;
  bool packed;

  DSNET_DEVICE int count() const { return (tokens + tile - 1) / tile; }
  DSNET_DEVICE T* grads(int stage) const { return shared + 2 * stage * tile_values; }
  DSNET_DEVICE T* queries(int stage) const { return grads(stage) + tile_values; }
  DSNET_DEVICE float* vectors(int stage) const {
    return reinterpret_cast<float*>(grads(backward_stages<T>)) + vectors_of_tile * stage * tile;
  }

  DSNET_DEVICE void operator()(int i, int stage) const {
    const int first = i * tile, left = tokens - first;
    copy_rows<T, head_tile>(grads(stage), grad_rows + int64_t{first} * channels, channels, tile,
        left, head_dim, packed);
    copy_rows<T, head_tile>(queries(stage), q + int64_t{first} * 3 * channels, 3 * channels, tile,
        left, head_dim, true);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < tile) {
      const int at = thread < left ? first + thread : 0, bytes = thread < left ? 4 : 0;
#pragma unroll
      for (int v = 0; v < vectors_of_tile; ++v) {
        copy_async<4>(vectors(stage) + v * tile + thread, vector[v] + at, bytes);
      }
    }
  }
};

// dK and dV of 64 keys of one head, or one of the two where a block's registers hold no more.
template <typename T, int head_tile>
__global__ void __launch_bounds__(128, key_blocks<T, head_tile>)
    global_attention_backward_keys(const AttentionBackward args, const AttentionLaunch l) {
  constexpr int tile = query_rows<T, head_tile>, tiles = tile / 8;
  constexpr int parts = key_parts<head_tile>;
  constexpr int matrix_values = AttentionLaunch::block_rows * row_stride<T, head_tile>;
  const AttentionShape& shape = args.shape;
  const HeadPlace place(shape, l.row_tiles, blockIdx.x / parts);
  const bool has_v = parts == 1 || blockIdx.x % parts == 0;
  const bool has_k = parts == 1 || !has_v;
  const int tokens = static_cast<int>(shape.tokens), head_dim = static_cast<int>(shape.head_dim);
  const int64_t channels = shape.width, column = int64_t{place.head} * head_dim;
  const int lane = lane_id();
  const int warp_row = static_cast<int>(threadIdx.x / 32) * AttentionLaunch::warp_rows;
  const int first_key = place.first_row + warp_row;
  const int64_t first_token = place.image * tokens;
  const T* q = static_cast<const T*>(args.qkv) + first_token * 3 * channels + column;
  T* shared = dynamic_shared<T>();
  for (int part = 0; part < 2; ++part) {
    copy_rows<T, head_tile>(shared + part * matrix_values,
        q + place.first_row * 3 * channels + (part + 1) * channels, 3 * channels,
        AttentionLaunch::block_rows, tokens - place.first_row, head_dim, true);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const T* own = shared + warp_row * row_stride<T, head_tile>;
  const LeftRows<T, head_tile> keys(own), values(own + matrix_values);
  const DropoutMask mask(args.inputs.dropout, place);
  const float scale = logit_scale(shape), scale2 = scale * log2_e;
  const int64_t sums = (place.image * shape.heads + place.head) * tokens;
  const int64_t all_sums = shape.batch * shape.heads * tokens;
  const float* row_sums = args.row_sums + sums;
  const QueryTiles<T, head_tile> query_tiles{
      static_cast<const T*>(args.grad) + first_token * channels + column, q,
      {args.lse + sums, row_sums, row_sums + all_sums}, shared + 2 * matrix_values, tokens,
      head_dim, channels, l.packed};
  float sums_of[2 / parts][head_tile / 8][4] = {};
  auto& grad_v = sums_of[0];
  auto& grad_k = sums_of[1 / parts];
  for_each_tile<backward_stages<T>>(query_tiles.count(), query_tiles, [&](int i, int stage) {
    const int queries = tokens - i * tile, used = queries < tile ? (queries + 7) / 8 : tiles;
    float p[tiles][4] = {}, ds[tiles][4] = {};
    multiply_transposed(keys, query_tiles.queries(stage), used, p);
    multiply_transposed(values, query_tiles.grads(stage), used, ds);
    uint32_t kept = 0;
    if (mask.is_active()) {
      kept = mask.kept_of_keys<tiles>(first_key, i * tile);
      mask.apply(kept, ds);
    }
    const float* vectors = query_tiles.vectors(stage);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      const int at = 8 * t + lane % 4 * 2;
      const auto lse = load_shared<Pack<float, 2>>(vectors + at);
      const auto delta = load_shared<Pack<float, 2>>(vectors + tile + at);
      Pack<float, 2> inverse{{1, 1}};
      if constexpr (is_renormalized<T>) {
        inverse = load_shared<Pack<float, 2>>(vectors + 2 * tile + at);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_real = at + k % 2 < queries;
        const float exponent = fmaf(p[t][k], scale2, -lse.values[k % 2] * log2_e);
        const float weight = exp2_approx(exponent) * inverse.values[k % 2];
        const float gradient = weight * (ds[t][k] - delta.values[k % 2]);
        p[t][k] = is_real ? weight : 0.0f;
        ds[t][k] = is_real ? gradient : 0.0f;
      }
    }
    if (mask.is_active()) mask.apply(kept, p);
    if (has_v) multiply_result<T>(p, query_tiles.grads(stage), used, grad_v);
    if (has_k) multiply_result<T>(ds, query_tiles.queries(stage), used, grad_k);
  });
  T* out = static_cast<T*>(args.grad_qkv) + (first_token + first_key) * 3 * channels + column;
  if (has_k) {
    store_rows(grad_k, scale, out + channels, 3 * channels, tokens - first_key, head_dim);
  }
  if (has_v) {
    store_rows(grad_v, 1.0f, out + 2 * channels, 3 * channels, tokens - first_key, head_dim);
  }
}

// Threads of the two kernels below: rows of a block, and columns of a block and rows at once.
struct NormBackward {
  static constexpr int rows = 16;
  static constexpr int columns = 32;
  static constexpr int row_lanes = 8;
};

// grad_x = grad + (g − mean(g) − unit·mean(g·unit)) / deviation with unit = (x − mean) / deviation
// and g = grad_normalized·weight. Eight lanes share a row.
template <typename T>
__global__ void __launch_bounds__(8 * NormBackward::rows)
    global_attention_backward_norm(const AttentionBackward args, const AttentionLaunch l) {
  constexpr int width = 16 / sizeof(T);
  const int channels = static_cast<int>(args.shape.width);
  const int64_t row = int64_t{blockIdx.x} * NormBackward::rows + threadIdx.x / 8;
  const bool is_real = row < args.shape.batch * args.shape.tokens;
  const int64_t at = row * channels;
  const T* x = static_cast<const T*>(args.inputs.x) + at;
  const T* above = static_cast<const T*>(args.grad_normalized) + at;
  Pack<float, 2> statistics{};
  if (is_real) statistics = load_global<Pack<float, 2>>(args.statistics + 2 * row);
  const float mean = statistics.values[0], inverse = statistics.values[1];
  const auto load = [&](int column, float (&g)[width], float (&unit)[width]) {
    load_values(above + column, true, g);
    load_values(x + column, l.packed, unit);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      g[k] *= parameter_at<T>(args.inputs.norm_weight, column + k, 1);
      unit[k] = (unit[k] - mean) * inverse;
    }
  };
  const int first = static_cast<int>(threadIdx.x % 8) * width;
  const int end = is_real ? channels : 0;
  float sum = 0, product = 0;
  for (int column = first; column < end; column += 8 * width) {
    float g[width], unit[width];
    load(column, g, unit);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      sum += g[k];
      product = fmaf(g[k], unit[k], product);
    }
  }
  const float mean_g = warp_sum(sum, 8) / static_cast<float>(channels);
  const float mean_product = warp_sum(product, 8) / static_cast<float>(channels);
  for (int column = first; column < end; column += 8 * width) {
    float g[width], unit[width], result[width];
    load(column, g, unit);
    load_values(static_cast<const T*>(args.grad) + at + column, l.packed, result);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      result[k] = fmaf(inverse, g[k] - mean_g - unit[k] * mean_product, result[k]);
    }
    store_global(static_cast<T*>(args.grad_x) + at + column, narrow<T>(result));
  }
}

// Of one slot's rows of `matrix` (rows, columns): with x the sums of matrix·unit and of matrix,
// else the latter alone. Writes (2 or 1, slots, columns).
template <typename T>
__global__ void __launch_bounds__(NormBackward::columns* NormBackward::row_lanes)
    global_attention_column_sums(const T* matrix, const T* x, const float* statistics, int64_t rows,
        int64_t columns, int64_t slot_rows, float* partials) {
  constexpr int block_columns = NormBackward::columns;
  constexpr int values = NormBackward::row_lanes * block_columns;
  __shared__ SharedArray<float, 2 * values> exchange_storage;
  float* exchange = exchange_storage;
  const bool has_norm = x != nullptr;
  const int results = has_norm ? 2 : 1;
  const int64_t groups = (columns + block_columns - 1) / block_columns;
  const int64_t column = blockIdx.x % groups * block_columns + threadIdx.x;
  const int64_t slot = blockIdx.x / groups, slots = gridDim.x / groups;
  const int64_t end = (slot + 1) * slot_rows < rows ? (slot + 1) * slot_rows : rows;
  float sum_of_values = 0, sum_of_products = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = slot * slot_rows + threadIdx.y; row < end; row += NormBackward::row_lanes) {
      const float value = widen(load_global<T>(matrix + row * columns + column));
      sum_of_values += value;
      if (has_norm) {
        const auto [mean, inverse] = load_global<Pack<float, 2>>(statistics + 2 * row).values;
        const float unit = (widen(load_global<T>(x + row * columns + column)) - mean) * inverse;
        sum_of_products = fmaf(value, unit, sum_of_products);
      }
    }
  }
  float* own = exchange + threadIdx.y * block_columns + threadIdx.x;
  store_shared(own, has_norm ? sum_of_products : sum_of_values);
  if (has_norm) store_shared(own + values, sum_of_values);
  __syncthreads();
  const auto r = static_cast<int>(threadIdx.y);
  if (r >= results || column >= columns) return;
  float sum = 0;
  for (int i = 0; i < NormBackward::row_lanes; ++i) {
    sum += load_shared<float>(exchange + r * values + i * block_columns + threadIdx.x);
  }
  store_global(partials + (r * slots + slot) * columns + column, sum);
}

// Partial sums over the rows of a matrix.
struct ColumnSums {
  const void* matrix;  // (rows, columns)
  const void* x;       // (rows, columns): sums of matrix·unit too; or null
  const float* statistics;
  int64_t rows, columns, slots, slot_rows;
  float* partials;  // (2 or 1, slots, columns)
};

void column_sums(Storage storage, const ColumnSums& sums, cudaStream_t stream);

}  // namespace dsnet::cuda
