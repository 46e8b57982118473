// Co-attention on the GPU: softmax and weighted values of both directions. A warp owns 16 queries
// and goes over tiles of keys with an online softmax.
//
// The local queries have all global keys in one block. The local keys of the global queries are
// split between blocks, whose partial maxima, sums and values another kernel combines in order. So
// the local tokens are read once as queries, and as keys once for every 64 global tokens and, in
// the absorbed form, head; all blocks of an image follow each other and share what the cache holds.
#pragma once

#include "cuda/co_attention_tiles.cuh"
#include "cuda/global_attention.cuh"

namespace dsnet::cuda {

// Where the local queries' results go.
struct LocalResult {
  float* softmax;  // (B, h, N, 2) or null
  void* out;       // (B, N, out_columns): of each head, or absorbed the stream, then it may be null
  int out_columns;
  const void* residual;  // (B, N, out_columns), absorbed
  Parameter bias;        // (out_columns), absorbed
  bool packed;           // 16 bytes per access to the absorbed form's out and residual
  Rows grads;            // of the results, where there are facts
  float* facts;          // (B, h, N, 4) or null: QueryFacts
};

// The weights of a tile's keys in place of its logits, dropped ones zero; adds to `softmax`.
template <typename T, int column_tile, int tile>
DSNET_DEVICE void add_tile(OnlineSoftmax<T, column_tile, tile>& softmax,
    const LeftRows<T, column_tile>& queries, const T* keys, const T* values, const float* bias,
    int first_query, int first_key, int key_end, const DropoutMask& mask, float (&kept)[2]) {
  constexpr int tiles = tile / 8;
  const int left = key_end - first_key, used = left < tile ? (left + 7) / 8 : tiles;
  float weights[tiles][4] = {}, correction[2];
  start_from_columns(bias, first_key, left, weights);
  multiply_transposed(queries, keys, used, weights);
  softmax.weigh(weights, left, correction);
  if (mask.is_active()) {
    mask.apply(mask.template kept_of_queries<tiles>(first_query, first_key), weights);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      kept[half] *= correction[half];
#pragma unroll
      for (int t = 0; t < tiles; ++t) kept[half] += weights[t][2 * half] + weights[t][2 * half + 1];
    }
  }
  softmax.accumulate(weights, values, used);
}

// 64 local queries of one head, or absorbed of all, whose results are summed.
template <typename T, int column_tile, bool is_absorbed>
__global__ void __launch_bounds__(128, 2)
    co_attention_local(const Direction d, const LocalResult r, const CoAttentionLaunch l) {
  constexpr int tile = tile_rows<T, column_tile>, stride = row_stride<T, column_tile>;
  const Place place(
      blockIdx.x, is_absorbed ? 1 : d.heads, l.local_tiles, 1, d.key_count, d.key_count);
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int first_query = place.first_row + warp_row;
  T* shared = dynamic_shared<T>();
  copy_own_rows<T, column_tile>(shared,
      d.queries.at<T>(place.image, place.head) + place.first_row * d.queries.row, d.queries.row,
      d.query_count - place.first_row, d.columns);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const LeftRows<T, column_tile> queries(shared + warp_row * stride);
  float total[is_absorbed ? column_tile / 8 : 1][4] = {};
  T* out = static_cast<T*>(r.out);
  if (out != nullptr) {
    out += (place.image * d.query_count + first_query) * r.out_columns + place.head * d.columns;
  }
  const int end = is_absorbed ? d.heads : place.head + 1;
  for (int head = place.head; head < end; ++head) {
    const TilePairs<T, column_tile, tile> tiles{d.keys.at<T>(place.image, head),
        d.values.at<T>(place.image, head), d.keys.row, d.values.row,
        shared + CoAttentionLaunch::block_rows * stride, 0, d.key_count, d.columns};
    const DropoutMask mask = d.mask(place.image, head);
    OnlineSoftmax<T, column_tile, tile> softmax(d.scale);
    float kept[2] = {};
    for_each_tile<pair_stages<T>>(tiles.count(), tiles, [&](int i, int stage) {
      add_tile(softmax, queries, tiles.left(stage), tiles.right(stage),
          d.bias_of(place.image, head), first_query, i * tile, d.key_count, mask, kept);
    });
    const int64_t sums = (place.image * d.heads + head) * d.query_count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = lane / 4 + 8 * half, query = first_query + own;
      const bool is_real = query < d.query_count;
      const float sum = softmax.sum(half), max = softmax.max(half), inverse = 1.0f / sum;
      if (is_real && lane % 4 == 0 && r.softmax != nullptr) {
        store_global(r.softmax + 2 * (sums + query), Pack<float, 2>{{max, sum}});
      }
      if constexpr (is_absorbed) {
#pragma unroll
        for (int t = 0; t < column_tile / 8; ++t) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            total[t][i] = fmaf(softmax.out()[t][i], inverse, total[t][i]);
          }
        }
        if (r.facts == nullptr) continue;
      }
      float delta = 0;
#pragma unroll
      for (int group = 0; group < column_tile / 32; ++group) {
        float values[8], grads[8] = {};
        gather_row(softmax.out(), 4 * group, half, values);
        const int column = 32 * group + lane % 4 * 8;
        if (!is_real || column >= d.columns) continue;
#pragma unroll
        for (float& value : values) value *= inverse;
        if constexpr (!is_absorbed)
          store_eight(out + int64_t{own} * r.out_columns + column, values);
        if (r.facts == nullptr) continue;
        load_values(r.grads.at<T>(place.image, head) + query * r.grads.row + column, true, grads);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta = fmaf(grads[i], values[i], delta);
      }
      delta = warp_sum(delta, 4);
      if (is_real && lane % 4 == 0 && r.facts != nullptr) {
        store_global(r.facts + 4 * (sums + query), PackedFacts{{max * log2_e, inverse, delta, 0}});
      }
    }
  }
  if constexpr (is_absorbed) {
    if (r.out == nullptr) return;
    const T* residual = static_cast<const T*>(r.residual) +
                        (place.image * d.query_count + first_query) * r.out_columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < column_tile / 32; ++group) {
        float values[8];
        gather_row(total, 4 * group, half, values);
        const int column = 32 * group + lane % 4 * 8, own = lane / 4 + 8 * half;
        const int left = first_query + own < d.query_count ? r.out_columns - column : 0;
        const int64_t at = int64_t{own} * r.out_columns + column;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i < left) values[i] += parameter_at<T>(r.bias, column + i, 0);
        }
        add_eight(residual + at, left, r.packed, values);
        store_eight(out + at, left, r.packed, values);
      }
    }
  }
}

// Values of a partial row of a global query: its maximum, sum and kept sum, then its values.
inline constexpr int partial_head = 4;

// 64 global queries of one head, and one split of the local keys.
template <typename T, int column_tile>
__global__ void __launch_bounds__(128, blocks_of_tile<column_tile>)
    co_attention_global(const Direction d, const CoAttentionLaunch l, float* partials) {
  constexpr int tile = tile_rows<T, column_tile>, stride = row_stride<T, column_tile>;
  const Place place(blockIdx.x, d.heads, l.global_tiles, l.splits, l.split_rows, d.key_count);
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int first_query = place.first_row + warp_row;
  T* shared = dynamic_shared<T>();
  copy_own_rows<T, column_tile>(shared,
      d.queries.at<T>(place.image, place.head) + place.first_row * d.queries.row, d.queries.row,
      d.query_count - place.first_row, d.columns);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const LeftRows<T, column_tile> queries(shared + warp_row * stride);
  const TilePairs<T, column_tile, tile> tiles{d.keys.at<T>(place.image, place.head),
      d.values.at<T>(place.image, place.head), d.keys.row, d.values.row,
      shared + CoAttentionLaunch::block_rows * stride, place.begin, place.end, d.columns};
  const DropoutMask mask = d.mask(place.image, place.head);
  OnlineSoftmax<T, column_tile, tile> softmax(d.scale);
  float kept[2] = {};
  for_each_tile<pair_stages<T>>(tiles.count(), tiles, [&](int i, int stage) {
    add_tile(softmax, queries, tiles.left(stage), tiles.right(stage), nullptr, first_query,
        place.begin + i * tile, place.end, mask, kept);
  });

  const int64_t heads_of_batch = d.batch * d.heads;
  const int64_t first =
      (place.split * heads_of_batch + place.image * d.heads + place.head) * d.query_count;
  const int64_t row_values = partial_head + d.columns;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + lane / 4 + 8 * half;
    const bool is_real = query < d.query_count;
    const float sum = softmax.sum(half), kept_sum = warp_sum(kept[half], 4);
    float* row = partials + (first + query) * row_values;
#pragma unroll
    for (int group = 0; group < column_tile / 32; ++group) {
      float values[8];
      gather_row(softmax.out(), 4 * group, half, values);
      const int column = 32 * group + lane % 4 * 8;
      if (is_real && column < d.columns) store_eight(row + partial_head + column, values);
    }
    if (is_real && lane % 4 == 0) {
      store_global(
          row, Pack<float, 4>{{softmax.max(half), sum, mask.is_active() ? kept_sum : sum, 0}});
    }
  }
}

// Combines the splits of the global queries: a warp per query and head.
// A template, so that the unit alone that launches it has it.
template <int = 0>
__global__ void __launch_bounds__(128)
    co_attention_combine(const Direction d, int64_t splits, const float* partials, float* softmax,
        float* out, int64_t out_image, int64_t out_head, int64_t out_row, float* kept) {
  const int64_t all = d.batch * d.heads * d.query_count;
  const int64_t at = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (at >= all) return;
  const int query = static_cast<int>(at % d.query_count), lane = lane_id();
  const int head = static_cast<int>(at / d.query_count % d.heads);
  const int64_t image = at / d.query_count / d.heads;
  const int64_t row_values = partial_head + d.columns;
  const float* first = partials + at * row_values;
  const auto head_of = [&](int64_t split) {
    return load_global<Pack<float, 4>>(first + split * all * row_values);
  };
  float max = head_of(0).values[0];
  for (int64_t split = 1; split < splits; ++split) max = fmaxf(max, head_of(split).values[0]);
  // The factor of the split with the maximum is exactly 1.
  const float offset = multiply_rounded(max, log2_e);
  float sum = 0, kept_sum = 0;
  const auto factor_of = [&](const Pack<float, 4>& part) {
    return exp2_approx(multiply_rounded(part.values[0], log2_e) - offset);
  };
  for (int64_t split = 0; split < splits; ++split) {
    const auto part = head_of(split);
    const float factor = factor_of(part);
    sum = fmaf(part.values[1], factor, sum);
    kept_sum = fmaf(part.values[2], factor, kept_sum);
  }
  const float inverse = 1.0f / sum;
  out += image * out_image + head * out_head + query * out_row;
  for (int column = lane; column < d.columns; column += 32) {
    float value = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const float part =
          load_global<float>(first + split * all * row_values + partial_head + column);
      value = fmaf(part, factor_of(head_of(split)), value);
    }
    store_global(out + column, value * inverse);
  }
  if (lane > 0) return;
  if (softmax != nullptr) store_global(softmax + 2 * at, Pack<float, 2>{{max, sum}});
  if (kept != nullptr) {
    store_global(kept + (head * d.batch + image) * d.query_count + query, kept_sum * inverse);
  }
}

}  // namespace dsnet::cuda
