// What the kernels of self-attention share: LayerNorm and projection of tokens, tiles in shared
// memory, dropout.
#pragma once

#include "common/philox.h"
#include "cuda/fragments.cuh"
#include "cuda/global_attention.h"
#include "cuda/launch.cuh"
#include "cuda/pipeline.cuh"

namespace dsnet::cuda {

inline constexpr float log2_e = 1.44269504088896341f;

// The keys, or in the keys' gradient the queries, that a warp takes at a time: limited by the
// registers of two score matrices beside the sums, and by 8 KB of shared memory per tile.
template <typename T, int head_tile>
constexpr int tile_rows = sizeof(T) == 2 ? (head_tile > 64 ? 32 : 64) : (head_tile > 64 ? 16 : 32);

// Which head and rows a block works on.
struct HeadPlace {
  int64_t image;
  int head;
  int first_row;

  DSNET_DEVICE HeadPlace(const AttentionShape& shape, int64_t row_tiles, unsigned block) {
    const auto tiles = static_cast<unsigned>(row_tiles);
    const auto heads = static_cast<unsigned>(shape.heads);
    first_row = static_cast<int>(block % tiles) * AttentionLaunch::block_rows;
    head = static_cast<int>(block / tiles % heads);
    image = block / tiles / heads;
  }
};

// Rows of (…, stride) to shared memory, zero beyond `valid_rows` and `columns`; lands at a
// wait_copies.
template <typename T, int head_tile>
DSNET_DEVICE void copy_rows(
    T* shared, const T* rows, int64_t stride, int count, int valid_rows, int columns, bool packed) {
  constexpr int width = 16 / sizeof(T), units = head_tile / width;
  for (int i = static_cast<int>(threadIdx.x); i < count * units; i += blockDim.x) {
    const int row = i / units, column = i % units * width;
    const bool valid = row < valid_rows && column < columns;
    const T* from = valid ? rows + row * stride + column : rows;
    copy_sixteen(shared + row * row_stride<T, head_tile> + column, from, valid, packed);
  }
}

// Tiles of K and V of one head in shared memory, a pair per stage.
template <typename T, int head_tile>
struct KeyTiles {
  static constexpr int tile_values = tile_rows<T, head_tile> * row_stride<T, head_tile>;
  const T* q;  // the head's columns of the image's first token in (B, M, 3·C)
  T* shared;
  int tokens, head_dim;
  int64_t channels;

  DSNET_DEVICE int count() const {
    return (tokens + tile_rows<T, head_tile> - 1) / tile_rows<T, head_tile>;
  }
  DSNET_DEVICE const T* keys(int stage) const { return shared + 2 * stage * tile_values; }
  DSNET_DEVICE const T* values(int stage) const { return keys(stage) + tile_values; }

  DSNET_DEVICE void operator()(int i, int stage) const {
    constexpr int tile = tile_rows<T, head_tile>;
    const T* from = q + channels + int64_t{i} * tile * 3 * channels;
    T* to = shared + 2 * stage * tile_values;
    for (int part = 0; part < 2; ++part) {
      copy_rows<T, head_tile>(to + part * tile_values, from + part * channels, 3 * channels, tile,
          tokens - i * tile, head_dim, true);
    }
  }
};

// Bytes of 64 rows of `matrices` matrices and `stages` pairs of tiles.
template <typename T, int head_tile>
constexpr size_t attention_bytes(int matrices, int stages, int tile) {
  const int rows = matrices * AttentionLaunch::block_rows + 2 * stages * tile;
  return static_cast<size_t>(rows * row_stride<T, head_tile>) * sizeof(T);
}

// LayerNorm of a warp's 16 tokens, a chunk of 128 bytes of each at a time. Eight lanes share a row.
template <typename T>
class NormalizedRows {
 public:
  static constexpr int width = 16 / sizeof(T);
  static constexpr int columns = 8 * width;
  static constexpr int stride = row_stride<T, columns>;

  // Of `rows` tokens from `x` on, the others are zero.
  DSNET_DEVICE NormalizedRows(
      const AttentionInputs& inputs, const T* x, int64_t rows, int channels, bool packed)
      : inputs_(inputs),
        x_(x),
        rows_(static_cast<int>(rows < AttentionLaunch::warp_rows ? rows : 16)),
        channels_(channels),
        packed_(packed) {}

  DSNET_DEVICE void load(int chunk) {
    const int column = chunk * columns + column_;
#pragma unroll
    for (int i = 0; i < passes; ++i) raw_[i] = load_at(i, column);
  }

  // Mean and 1 / deviation of each row, the deviation from the mean itself.
  DSNET_DEVICE void measure() {
    float sums[passes] = {};
    for (int column = column_; column < channels_; column += columns) {
#pragma unroll
      for (int i = 0; i < passes; ++i) {
        float values[width];
        widen<T>(load_at(i, column), values);
#pragma unroll
        for (int k = 0; k < width; ++k) sums[i] += values[k];
      }
    }
    float squares[passes] = {};
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      mean_[i] = warp_sum(sums[i], 8) / static_cast<float>(channels_);
    }
    for (int column = column_; column < channels_; column += columns) {
#pragma unroll
      for (int i = 0; i < passes; ++i) {
        float values[width];
        widen<T>(load_at(i, column), values);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float difference = values[k] - mean_[i];
          squares[i] = fmaf(difference, difference, squares[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      const float variance = warp_sum(squares[i], 8) / static_cast<float>(channels_);
      inverse_[i] = 1.0f / sqrtf(variance + inputs_.eps);
    }
  }

  // The loaded chunk to shared memory, and to `normalized` (rows, C) unless that is null.
  DSNET_DEVICE void store(int chunk, T* shared, T* normalized) const {
    const int column = chunk * columns + column_;
    float weight[width] = {}, bias[width] = {};
    if (column < channels_) {
      load_parameter(inputs_.norm_weight, column, weight);
      load_parameter(inputs_.norm_bias, column, bias);
    }
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      float values[width];
      widen<T>(raw_[i], values);
      const bool inside = is_inside(i, column);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float unit = (values[k] - mean_[i]) * inverse_[i];
        values[k] = inside ? fmaf(unit, weight[k], bias[k]) : 0.0f;
      }
      const auto stored = narrow<T>(values);
      store_shared(shared + row(i) * stride + column_, stored);
      if (normalized != nullptr && inside) {
        store_global(normalized + int64_t{row(i)} * channels_ + column, stored);
      }
    }
  }

  // To (rows, 2).
  DSNET_DEVICE void store_statistics(float* statistics) const {
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      if (column_ > 0 || row(i) >= rows_) continue;
      store_global(statistics + 2 * row(i), Pack<float, 2>{{mean_[i], inverse_[i]}});
    }
  }

 private:
  static constexpr int passes = AttentionLaunch::warp_rows / 4;

  DSNET_DEVICE static int row(int pass) { return 4 * pass + lane_id() / 8; }
  DSNET_DEVICE bool is_inside(int pass, int column) const {
    return row(pass) < rows_ && column < channels_;
  }
  DSNET_DEVICE Stored<T, width> load_at(int pass, int column) const {
    if (!is_inside(pass, column)) return {};
    return load_sixteen(x_ + int64_t{row(pass)} * channels_ + column, packed_);
  }
  DSNET_DEVICE void load_parameter(
      const Parameter& parameter, int column, float (&out)[width]) const {
    if (parameter.is_float32) {
      load_values(static_cast<const float*>(parameter.data) + column, packed_, out);
    } else {
      load_values(static_cast<const T*>(parameter.data) + column, packed_, out);
    }
  }

  const AttentionInputs& inputs_;
  const T* x_;
  int rows_, channels_;
  bool packed_;
  int column_ = lane_id() % 8 * width;
  Stored<T, width> raw_[passes];
  float mean_[passes], inverse_[passes];
};

// Bytes of shared memory that `project` takes for `rows` tokens and N columns.
template <int N>
constexpr size_t projection_bytes(int rows) {
  constexpr int row_bytes = 128 + 16;
  return static_cast<size_t>((rows + 2 * N) * row_bytes) + N * sizeof(float);
}

// result = LayerNorm(x)·Wᵀ + b for a warp's 16 tokens and N columns; column n is row weight_row(n)
// of W, zero where that is negative. `shared` is free for other use after a barrier.
template <typename T, int N, typename WeightRow>
DSNET_DEVICE void project(NormalizedRows<T>& rows, const AttentionInputs& inputs, int channels,
    bool packed, T* shared, T* normalized, const WeightRow& weight_row, float (&result)[N / 8][4]) {
  constexpr int columns = NormalizedRows<T>::columns, stride = NormalizedRows<T>::stride;
  constexpr int width = 16 / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const T* weight = static_cast<const T*>(inputs.qkv_weight);
  T* own = shared + thread / 32 * 16 * stride;
  T* weights = shared + threads / 2 * stride;
  float* bias = reinterpret_cast<float*>(weights + 2 * N * stride);
  const auto copy_weights = [&](int chunk) {
    T* to = weights + chunk % 2 * N * stride;
    for (int i = thread; i < N * 8; i += threads) {
      const int n = i / 8, column = i % 8 * width, k = chunk * columns + column;
      const int row = weight_row(n);
      const bool valid = row >= 0 && k < channels;
      const T* from = valid ? weight + int64_t{row} * channels + k : weight;
      copy_sixteen(to + n * stride + column, from, valid, packed);
    }
    commit_copies();
  };

  copy_weights(0);
  rows.load(0);
  for (int n = thread; n < N; n += threads) {
    const int row = weight_row(n);
    store_shared(bias + n, row >= 0 ? parameter_at<T>(inputs.qkv_bias, row, 0) : 0.0f);
  }
  rows.measure();
  const int chunks = (channels + columns - 1) / columns;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    sync_warp();
    rows.store(chunk, own, normalized);
    wait_copies<0>();
    __syncthreads();
    if (chunk + 1 < chunks) {
      copy_weights(chunk + 1);
      rows.load(chunk + 1);
    }
    multiply_transposed<T, columns>(
        LeftRows<T, columns>(own), weights + chunk % 2 * N * stride, N / 8, result);
  }
#pragma unroll
  for (int t = 0; t < N / 8; ++t) {
    const auto pair = load_shared<Pack<float, 2>>(bias + 8 * t + lane_id() % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) result[t][i] += pair.values[i % 2];
  }
}

// The dropout of one head's weights.
class DropoutMask {
 public:
  DSNET_DEVICE DropoutMask(const Dropout& dropout, const HeadPlace& place)
      : DropoutMask(dropout, place.image, place.head) {}

  DSNET_DEVICE DropoutMask(const Dropout& dropout, int64_t image, int head)
      : threshold_(dropout.threshold),
        kept_scale_(dropout.kept_scale),
        head_(static_cast<uint32_t>(head)),
        image_(static_cast<uint32_t>(image)) {
    if (is_active()) seed_ = load_global<uint64_t>(dropout.seed);
  }

  DSNET_DEVICE bool is_active() const { return threshold_ > 0; }

  // Bit 4·t + i is set where value i of tile t stays. Rows are queries and columns are keys, both
  // from the given ones on, the keys from a multiple of 8. Two lanes share the words of four keys:
  // each draws a row. Loops stay loops: generators side by side would take the registers.
  template <int tiles>
  DSNET_DEVICE uint32_t kept_of_queries(int first_query, int first_key) const {
    static_assert(tiles <= 8, "four bits of a word for each tile");
    const int lane = lane_id(), is_odd = lane % 2;
    const int query = first_query + lane / 4 + 8 * is_odd;
    uint32_t kept = 0;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      const PhiloxWords words = draw(first_key / 4 + 2 * t + lane % 4 / 2, query);
      const uint32_t got0 = shuffle_xor(is_odd ? words.word[0] : words.word[2], 1);
      const uint32_t got1 = shuffle_xor(is_odd ? words.word[1] : words.word[3], 1);
      const uint32_t own0 = is_odd ? words.word[2] : words.word[0];
      const uint32_t own1 = is_odd ? words.word[3] : words.word[1];
      kept |= (is_odd ? bits(got0, got1, own0, own1) : bits(own0, own1, got0, got1)) << 4 * t;
    }
    return kept;
  }

  // The same where rows are keys and columns are queries: four lanes share the words of four keys,
  // and each draws one of their four pairs of row and query.
  template <int tiles>
  DSNET_DEVICE uint32_t kept_of_keys(int first_key, int first_query) const {
    static_assert(tiles <= 8, "four bits of a word for each tile");
    const int lane = lane_id(), drawn = lane / 4 % 4;
    const int key_block = first_key / 4 + 2 * (drawn / 2) + lane / 16;
    uint32_t kept = 0;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      PhiloxWords words = draw(key_block, first_query + 8 * t + lane % 4 * 2 + drawn % 2);
      transpose_among_lanes(words.word, 4);
      kept |= bits(words.word[0], words.word[1], words.word[2], words.word[3]) << 4 * t;
    }
    return kept;
  }

  // Zero where `kept` has no bit, the others scaled.
  template <int tiles>
  DSNET_DEVICE void apply(uint32_t kept, float (&values)[tiles][4]) const {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[t][i] = kept >> (4 * t + i) & 1 ? values[t][i] * kept_scale_ : 0.0f;
      }
    }
  }

 private:
  DSNET_DEVICE PhiloxWords draw(int key_block, int query) const {
    return philox(
        seed_, static_cast<uint32_t>(key_block), static_cast<uint32_t>(query), head_, image_);
  }
  DSNET_DEVICE uint32_t bits(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) const {
    return uint32_t{w0 >= threshold_} | uint32_t{w1 >= threshold_} << 1 |
           uint32_t{w2 >= threshold_} << 2 | uint32_t{w3 >= threshold_} << 3;
  }

  uint32_t threshold_;
  float kept_scale_;
  uint32_t head_, image_;
  uint64_t seed_ = 0;
};

}  // namespace dsnet::cuda
