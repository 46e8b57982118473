// Co-attention on the GPU: gradients of queries, keys and values in one direction.
//
// With logits s, weights P = exp2(log2(e)·s − offset)·inverse, kept and scaled to P' by dropout, g
// the gradient of a query's result,
//   dP = dropout(g·Vᵀ + constant)   δ_i = Σ_j P_ij·dP_ij   dS = P∘(dP − δ)
//   dQ = dS·K   dK = dSᵀ·Q   dV = P'ᵀ·g
// In one kernel warps own 16 queries each, in another 16 keys. The local tokens are read by each of
// them once as rows of their own, and once for every 64 global tokens and, absorbed, head.
#pragma once

#include "cuda/co_attention_attend.cuh"
#include "cuda/global_attention_backward.cuh"

namespace dsnet::cuda {

// One direction's gradients. `scale` is that of dQ and dK.
struct DirectionGradients {
  Rows grads;          // of the queries' results
  const float* facts;  // (B, h, queries, 4): QueryFacts
  float scale;
  bool sums_heads;  // of local rows, of which a block takes all
};

// Rows of results for each image and head: local ones in the storage of the streams, sums of global
// ones in float32 for each split.
struct ResultRows {
  void* data;
  int64_t split, image, head, row;

  template <typename V>
  DSNET_DEVICE V* at(const Place& place) const {
    return static_cast<V*>(data) + place.split * split + place.image * image + place.head * head +
           place.first_row * row;
  }
};

// A warp's 16 rows: T for local tokens, float32 partial sums for global ones.
template <typename T, int tiles>
DSNET_DEVICE void store_result(const float (&values)[tiles][4], float scale,
    const ResultRows& result, bool is_local, const Place& place, int warp_row, int rows,
    int columns) {
  const int64_t first = warp_row * result.row;
  if (is_local) {
    store_rows(values, scale, result.at<T>(place) + first, result.row, rows, columns);
  } else {
    store_rows(values, scale, result.at<float>(place) + first, result.row, rows, columns);
  }
}

// dQ of 64 queries. The local ones have all keys, of one head or summed over all; the global ones
// those of one split.
template <typename T, int column_tile>
__global__ void __launch_bounds__(128, blocks_of_tile<column_tile>)
    co_attention_backward_queries(const Direction d, const DirectionGradients g,
        const CoAttentionLaunch l, const ResultRows result, bool is_local) {
  constexpr int tile = tile_rows<T, column_tile>, tiles = tile / 8;
  constexpr int stride = row_stride<T, column_tile>;
  constexpr int matrix_values = CoAttentionLaunch::block_rows * stride;
  const bool sums_heads = is_local && g.sums_heads;
  const Place place(blockIdx.x, sums_heads ? 1 : d.heads, is_local ? l.local_tiles : l.global_tiles,
      is_local ? 1 : l.splits, is_local ? d.key_count : l.split_rows, d.key_count);
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int first_query = place.first_row + warp_row, rows_left = d.query_count - place.first_row;
  T* shared = dynamic_shared<T>();
  copy_own_rows<T, column_tile>(shared,
      d.queries.at<T>(place.image, place.head) + place.first_row * d.queries.row, d.queries.row,
      rows_left, d.columns);
  copy_own_rows<T, column_tile>(shared + matrix_values,
      g.grads.at<T>(place.image, place.head) + place.first_row * g.grads.row, g.grads.row,
      rows_left, d.columns);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const T* own = shared + warp_row * stride;
  const LeftRows<T, column_tile> queries(own), grads(own + matrix_values);
  const float scale2 = d.scale * log2_e;
  float grad_q[column_tile / 8][4] = {};
  const int end = sums_heads ? d.heads : place.head + 1;
  for (int head = place.head; head < end; ++head) {
    const float* facts_of_head =
        g.facts + 4 * ((place.image * d.heads + head) * d.query_count + first_query);
    const QueryFacts facts[2] = {load_facts(facts_of_head, lane / 4, d.query_count - first_query),
        load_facts(facts_of_head, lane / 4 + 8, d.query_count - first_query)};
    const DropoutMask mask = d.mask(place.image, head);
    const float* bias = d.bias_of(place.image, head);
    const TilePairs<T, column_tile, tile> pairs{d.keys.at<T>(place.image, head),
        d.values.at<T>(place.image, head), d.keys.row, d.values.row, shared + 2 * matrix_values,
        place.begin, place.end, d.columns};
    for_each_tile<pair_stages<T>>(pairs.count(), pairs, [&](int i, int stage) {
      const int first_key = place.begin + i * tile, keys = place.end - first_key;
      const int used = keys < tile ? (keys + 7) / 8 : tiles;
      float p[tiles][4] = {}, dp[tiles][4];
      start_from_columns(bias, first_key, keys, p);
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) dp[t][k] = facts[k / 2].constant;
      }
      multiply_transposed(queries, pairs.left(stage), used, p);
      multiply_transposed(grads, pairs.right(stage), used, dp);
      if (mask.is_active()) {
        mask.apply(mask.template kept_of_queries<tiles>(first_query, first_key), dp);
      }
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // Behind the last key the power may be infinite.
          const bool is_real = 8 * t + lane % 4 * 2 + k % 2 < keys;
          const QueryFacts& query = facts[k / 2];
          const float weight = exp2_approx(fmaf(p[t][k], scale2, -query.offset)) * query.inverse;
          p[t][k] = is_real ? weight * (dp[t][k] - query.delta) : 0.0f;
        }
      }
      multiply_result<T>(p, pairs.left(stage), used, grad_q);
    });
  }
  store_result<T>(
      grad_q, g.scale, result, is_local, place, warp_row, rows_left - warp_row, d.columns);
}

// Adds rows of (…, stride) to a warp's 16 rows.
template <typename T, int tiles>
DSNET_DEVICE void add_rows(
    const T* from, int64_t stride, int rows, int columns, float (&result)[tiles][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      const int column = 8 * t + lane % 4 * 2;
      if (row >= rows || column >= columns) continue;
      float pair[2];
      widen<T>(load_global<Stored<T, 2>>(from + row * stride + column), pair);
      result[t][2 * half] += pair[0];
      result[t][2 * half + 1] += pair[1];
    }
  }
}

// Queries at a time in the keys' kernel: two score matrices beside two sums in registers.
template <typename T, int column_tile>
constexpr int queries_of_tile = sizeof(T) == 4 && column_tile > 32 ? 16 : 32;

// Where the gradients of keys and values go.
struct KeyResult {
  ResultRows keys, values;    // with merged gradients the same
  float* bias;                // (splits, h, B, keys) or null
  const void* added[2] = {};  // rows like those of keys to be added to merged gradients, or null
};

// dK and dV of 64 keys, or where a block's registers do not hold both sums one of them. Local keys
// have all queries, of one head or, merged, dK + dV summed over all; global ones those of one
// split.
template <typename T, int column_tile, bool is_merged>
__global__ void __launch_bounds__(128, key_blocks<T, column_tile>)
    co_attention_backward_keys(const Direction d, const DirectionGradients g,
        const CoAttentionLaunch l, const KeyResult result, bool is_local) {
  constexpr int tile = queries_of_tile<T, column_tile>, tiles = tile / 8;
  constexpr int parts = is_merged ? 1 : key_parts<column_tile>;
  constexpr int stride = row_stride<T, column_tile>;
  constexpr int matrix_values = CoAttentionLaunch::block_rows * stride;
  const Place place(blockIdx.x / parts, is_merged ? 1 : d.heads,
      is_local ? l.local_tiles : l.global_tiles, is_local ? 1 : l.splits,
      is_local ? d.query_count : l.split_rows, d.query_count);
  const bool has_v = parts == 1 || blockIdx.x % parts == 0;
  const bool has_k = parts == 1 || !has_v;
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int first_key = place.first_row + warp_row, rows_left = d.key_count - place.first_row;
  T* shared = dynamic_shared<T>();
  copy_own_rows<T, column_tile>(shared,
      d.keys.at<T>(place.image, place.head) + place.first_row * d.keys.row, d.keys.row, rows_left,
      d.columns);
  copy_own_rows<T, column_tile>(shared + matrix_values,
      d.values.at<T>(place.image, place.head) + place.first_row * d.values.row, d.values.row,
      rows_left, d.columns);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const T* own = shared + warp_row * stride;
  const LeftRows<T, column_tile> keys(own), values(own + matrix_values);
  const float scale2 = d.scale * log2_e;
  constexpr int sums = is_merged ? 1 : 2 / parts;
  float sums_of[sums][column_tile / 8][4] = {};
  auto& grad_v = sums_of[0];
  auto& grad_k = sums_of[sums - 1];
  float grad_bias[2] = {};
  const int end = is_merged ? d.heads : place.head + 1;
  for (int head = place.head; head < end; ++head) {
    const DropoutMask mask = d.mask(place.image, head);
    const float* facts = g.facts + 4 * (place.image * d.heads + head) * d.query_count;
    const float* bias_of_keys = d.bias_of(place.image, head);
    float bias[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + lane / 4 + 8 * half;
      if (bias_of_keys != nullptr && key < d.key_count) {
        bias[half] = load_global<float>(bias_of_keys + key);
      }
    }
    const TilePairs<T, column_tile, tile> pairs{d.queries.at<T>(place.image, head),
        g.grads.at<T>(place.image, head), d.queries.row, g.grads.row, shared + 2 * matrix_values,
        place.begin, place.end, d.columns};
    for_each_tile<pair_stages<T>>(pairs.count(), pairs, [&](int i, int stage) {
      const int first_query = place.begin + i * tile, queries = place.end - first_query;
      const int used = queries < tile ? (queries + 7) / 8 : tiles;
      float p[tiles][4], ds[tiles][4];
      QueryFacts of_query[tiles][2];
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          of_query[t][k] = load_facts(facts, first_query + 8 * t + lane % 4 * 2 + k, place.end);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          p[t][k] = bias[k / 2];
          ds[t][k] = of_query[t][k % 2].constant;
        }
      }
      multiply_transposed(keys, pairs.left(stage), used, p);
      multiply_transposed(values, pairs.right(stage), used, ds);
      uint32_t kept = 0;
      if (mask.is_active()) {
        kept = mask.template kept_of_keys<tiles>(first_key, first_query);
        mask.apply(kept, ds);
      }
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const QueryFacts& query = of_query[t][k % 2];
          const bool is_real = 8 * t + lane % 4 * 2 + k % 2 < queries;
          const float weight = exp2_approx(fmaf(p[t][k], scale2, -query.offset)) * query.inverse;
          p[t][k] = is_real ? weight : 0.0f;
          ds[t][k] = is_real ? weight * (ds[t][k] - query.delta) : 0.0f;
          grad_bias[k / 2] += ds[t][k];
        }
      }
      if (mask.is_active()) mask.apply(kept, p);
      if (has_v) multiply_result<T>(p, pairs.right(stage), used, grad_v);
      if (has_k) multiply_result<T>(ds, pairs.left(stage), used, grad_k);
    });
  }

  const int own_left = rows_left - warp_row;
  if constexpr (is_merged) {
#pragma unroll
    for (const void* rows : result.added) {
      if (rows == nullptr) continue;
      ResultRows added = result.keys;
      added.data = const_cast<void*>(rows);
      add_rows(added.at<T>(place) + warp_row * added.row, added.row, own_left, d.columns, grad_k);
    }
  }
  if (has_k) {
    store_result<T>(grad_k, g.scale, result.keys, is_local, place, warp_row, own_left, d.columns);
  }
  if (has_v && !is_merged) {
    store_result<T>(grad_v, 1.0f, result.values, is_local, place, warp_row, own_left, d.columns);
  }
  if (result.bias == nullptr || !has_k) return;
  float* to = result.bias +
              ((static_cast<int64_t>(place.split) * d.heads + place.head) * d.batch + place.image) *
                  d.key_count;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = warp_sum(grad_bias[half], 4) * g.scale;
    const int key = first_key + lane / 4 + 8 * half;
    if (key < d.key_count && lane % 4 == 0) store_global(to + key, sum);
  }
}

}  // namespace dsnet::cuda
