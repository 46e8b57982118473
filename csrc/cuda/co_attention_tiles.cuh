// What the attention kernels of co-attention share: operands of one direction, their tiles in
// shared memory, what is known of a query.
//
// Both forms are two directions of one attention. Projected, queries, keys and values are a head's
// d channels. Absorbed, the Cl channels of a local token t are query, key and value alike, and
//   A_h = K_h·W_q,h/√d   a_h = K_h·b_q,h/√d   U_h = V_h·W_proj,hᵀ   G_h = Q_h·W_k,h/√d
// of the global tokens are the other side: keys A (logits t·A + a) and values U of the local
// queries, whose heads are summed, and queries G of the local keys.
#pragma once

#include "cuda/co_attention.h"
#include "cuda/global_attention_tiles.cuh"

namespace dsnet::cuda {

// Rows of a matrix for each image and head, 16 bytes aligned; distances in values.
struct Rows {
  const void* data;
  int64_t image, head, row;

  template <typename T>
  DSNET_DEVICE const T* at(int64_t image_index, int head_index) const {
    return static_cast<const T*>(data) + image_index * image + head_index * head;
  }
};

// One direction of the attention.
struct Direction {
  Rows queries, keys, values;
  const float* key_bias;  // (h, B, keys), added to the logits, or null
  int64_t batch;
  int heads, query_count, key_count;
  int columns;  // of queries, keys and values
  float scale;  // of the logits
  Dropout dropout;
  int first_head;  // of those that dropout counts

  DSNET_DEVICE const float* bias_of(int64_t image, int head) const {
    return key_bias == nullptr ? nullptr : key_bias + (head * batch + image) * key_count;
  }
  DSNET_DEVICE DropoutMask mask(int64_t image, int head) const {
    return {dropout, image, first_head + head};
  }
};

// What a block works on: 64 rows of an image and head, and the other side's rows `begin` to `end`.
struct Place {
  int64_t image;
  int head, first_row, split, begin, end;

  // Blocks in the order of image, head, split, tile: those that read the same tokens are
  // neighbours.
  DSNET_DEVICE Place(unsigned block, int heads, int64_t tiles, int64_t splits, int64_t split_rows,
      int other_rows) {
    const auto tile_count = static_cast<unsigned>(tiles);
    const auto split_count = static_cast<unsigned>(splits);
    first_row = static_cast<int>(block % tile_count) * CoAttentionLaunch::block_rows;
    block /= tile_count;
    split = static_cast<int>(block % split_count);
    block /= split_count;
    head = static_cast<int>(block % static_cast<unsigned>(heads));
    image = block / static_cast<unsigned>(heads);
    const int64_t first = split * split_rows, last = first + split_rows;
    begin = static_cast<int>(first);
    end = last < other_rows ? static_cast<int>(last) : other_rows;
  }
};

// Tiles of rows `begin` to `end` of two matrices in shared memory, a pair per stage. Where both are
// the same matrix it is copied once.
template <typename T, int columns_tile, int tile>
struct TilePairs {
  static constexpr int tile_values = tile * row_stride<T, columns_tile>;
  const T *first, *second;  // of the image and head
  int64_t first_row, second_row;
  T* shared;
  int begin, end, columns;

  DSNET_DEVICE bool are_same() const { return first == second; }
  DSNET_DEVICE int count() const { return (end - begin + tile - 1) / tile; }
  DSNET_DEVICE T* left(int stage) const { return shared + 2 * stage * tile_values; }
  DSNET_DEVICE T* right(int stage) const {
    return are_same() ? left(stage) : left(stage) + tile_values;
  }

  DSNET_DEVICE void operator()(int i, int stage) const {
    const int64_t row = begin + int64_t{i} * tile;
    const int rows = end - static_cast<int>(row);
    copy_rows<T, columns_tile>(
        left(stage), first + row * first_row, first_row, tile, rows, columns, true);
    if (are_same()) return;
    copy_rows<T, columns_tile>(
        right(stage), second + row * second_row, second_row, tile, rows, columns, true);
  }
};

// Logits of a tile start from the keys' bias.
template <int tiles>
DSNET_DEVICE void start_from_columns(
    const float* bias, int first_key, int keys, float (&values)[tiles][4]) {
  if (bias == nullptr) return;
  const int lane = lane_id();
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = 8 * t + lane % 4 * 2 + i;
      const float value = key < keys ? load_global<float>(bias + first_key + key) : 0.0f;
      values[t][i] = values[t][2 + i] = value;
    }
  }
}

// What the backward knows of a query: its weights are exp2(log2(e)·logit − offset)·inverse, and
// with g the gradient of its result their gradients dropout(g·valueᵀ + constant) − delta.
struct QueryFacts {
  float offset, inverse, delta, constant;
};
using PackedFacts = Pack<float, 4>;

DSNET_DEVICE QueryFacts load_facts(const float* facts, int row, int rows) {
  if (row >= rows) return {0, 0, 0, 0};
  const auto packed = load_global<PackedFacts>(facts + int64_t{4} * row);
  return {packed.values[0], packed.values[1], packed.values[2], packed.values[3]};
}

// Blocks that share a multiprocessor, by the registers that they take without spills.
template <int column_tile>
constexpr int blocks_of_tile = column_tile > 64 ? 2 : 3;

// 64 rows to shared memory; they land at a wait_copies.
template <typename T, int column_tile>
DSNET_DEVICE void copy_own_rows(T* shared, const T* rows, int64_t stride, int valid, int columns) {
  copy_rows<T, column_tile>(
      shared, rows, stride, CoAttentionLaunch::block_rows, valid, columns, true);
}

// Bytes of 64 rows of `matrices` matrices and `stages` pairs of tiles.
template <typename T, int column_tile>
constexpr size_t co_attention_bytes(int matrices, int stages, int tile) {
  const int rows = matrices * CoAttentionLaunch::block_rows + 2 * stages * tile;
  return static_cast<size_t>(rows) * row_stride<T, column_tile> * sizeof(T);
}

// Pairs of tiles under way: as many as 99 KB of shared memory hold for every width.
template <typename T>
constexpr int pair_stages = sizeof(T) == 2 ? 2 : 1;

}  // namespace dsnet::cuda
