// Co-attention on the GPU: what its backward does to single tokens and sums over tokens.
#pragma once

#include "cuda/co_attention_tiles.cuh"
#include "cuda/global_attention_backward.cuh"

namespace dsnet::cuda {

// Facts of the global queries, from their saved softmax and result. A warp has a query of a head.
template <typename T>
__global__ void __launch_bounds__(128)
    co_attention_global_facts(const Direction d, const Rows grads, const float* softmax,
        const Rows results, const float* kept, const float* constants, float* facts, float* zero) {
  const int64_t at = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (at >= d.batch * d.heads * d.query_count) return;
  const int query = static_cast<int>(at % d.query_count), lane = lane_id();
  const int head = static_cast<int>(at / d.query_count % d.heads);
  const int64_t image = at / d.query_count / d.heads;
  const T* grad = grads.at<T>(image, head) + query * grads.row;
  const float* result = results.at<float>(image, head) + query * results.row;
  float delta = 0;
  for (int column = lane; column < d.columns; column += 32) {
    delta = fmaf(widen(load_global<T>(grad + column)), load_global<float>(result + column), delta);
  }
  delta = warp_sum(delta);
  if (lane > 0) return;
  const int64_t by_head = (head * d.batch + image) * d.query_count + query;
  const float constant = constants == nullptr ? 0.0f : load_global<float>(constants + by_head);
  if (kept != nullptr) delta = fmaf(constant, load_global<float>(kept + by_head), delta);
  const auto saved = load_global<Pack<float, 2>>(softmax + 2 * at);
  store_global(facts + 4 * at,
      PackedFacts{{saved.values[0] * log2_e, 1.0f / saved.values[1], delta, constant}});
  // Of a constant of all logits of a query: no gradient, unless that is no number.
  if (zero != nullptr) store_global(zero + by_head, 0.0f * delta);
}

// sums[i] = Σ partials[split][i] in order, in V.
template <typename V>
__global__ void __launch_bounds__(256)
    co_attention_sum(const float* partials, int64_t splits, int64_t count, V* sums) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
  for (int64_t split = 0; split < splits; ++split) {
    sum += load_global<float>(partials + split * count + i);
  }
  store_global(sums + i, narrow(sum, V{}));
}

template <typename V>
void launch_sum(
    const float* partials, int64_t splits, int64_t count, V* sums, cudaStream_t stream) {
  launch("co_attention_sum", co_attention_sum<V>,
      {dim3{static_cast<unsigned>(divide_up(count, 256))}, dim3{256}}, stream, partials, splits,
      count, sums);
}

// out = grad + (g − mean(g) − unit·mean(g·unit)) / deviation with unit = (x − mean) / deviation and
// g = above·weight. A warp has a row.
template <typename T>
__global__ void __launch_bounds__(128) co_attention_backward_norm(const T* above, const T* x,
    const T* grad, Parameter weight, const float* statistics, int64_t rows, int width, T* out) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = lane_id();
  const auto [mean, inverse] = load_global<Pack<float, 2>>(statistics + 2 * row).values;
  const int64_t first = row * width;
  float sum = 0, product = 0;
  for (int i = lane; i < width; i += 32) {
    const float g = widen(load_global<T>(above + first + i)) * parameter_at<T>(weight, i, 1);
    const float unit = (widen(load_global<T>(x + first + i)) - mean) * inverse;
    sum += g;
    product = fmaf(g, unit, product);
  }
  const float mean_g = warp_sum(sum) / static_cast<float>(width);
  const float mean_product = warp_sum(product) / static_cast<float>(width);
  for (int i = lane; i < width; i += 32) {
    const float g = widen(load_global<T>(above + first + i)) * parameter_at<T>(weight, i, 1);
    const float unit = (widen(load_global<T>(x + first + i)) - mean) * inverse;
    const float value =
        fmaf(inverse, g - mean_g - unit * mean_product, widen(load_global<T>(grad + first + i)));
    store_global(out + first + i, narrow(value, T{}));
  }
}

// out = grad + scale·above, and of one slot's rows the sums of x·above and of above; rows of
// `above` are above_row apart. Writes partials (2, slots, width).
template <typename T>
__global__ void __launch_bounds__(NormBackward::columns* NormBackward::row_lanes, 4)
    co_attention_backward_affine(const T* above, int64_t above_row, const T* x, const T* grad,
        Parameter scale, int64_t rows, int width, int64_t slot_rows, T* out, float* partials) {
  constexpr int block_columns = NormBackward::columns, lanes = NormBackward::row_lanes;
  __shared__ SharedArray<float, 2 * lanes * block_columns> exchange_storage;
  float* exchange = exchange_storage;
  const auto groups = static_cast<unsigned>((width + block_columns - 1) / block_columns);
  const int column = static_cast<int>(blockIdx.x % groups * block_columns + threadIdx.x);
  const int64_t slot = blockIdx.x / groups, slots = gridDim.x / groups;
  const int64_t end = (slot + 1) * slot_rows < rows ? (slot + 1) * slot_rows : rows;
  float sums[2] = {};
  if (column < width) {
    const float factor = parameter_at<T>(scale, column, 1);
#pragma unroll 4
    for (int64_t row = slot * slot_rows + threadIdx.y; row < end; row += lanes) {
      const float value = widen(load_global<T>(above + row * above_row + column));
      const int64_t at = row * width + column;
      sums[0] = fmaf(widen(load_global<T>(x + at)), value, sums[0]);
      sums[1] += value;
      const float result = fmaf(factor, value, widen(load_global<T>(grad + at)));
      store_global(out + at, narrow(result, T{}));
    }
  }
  for (int r = 0; r < 2; ++r) {
    store_shared(exchange + (r * lanes + static_cast<int>(threadIdx.y)) * block_columns +
                     static_cast<int>(threadIdx.x),
        sums[r]);
  }
  __syncthreads();
  const auto r = static_cast<int>(threadIdx.y);
  if (r >= 2 || column >= width) return;
  float sum = 0;
  for (int i = 0; i < lanes; ++i) {
    sum += load_shared<float>(
        exchange + (r * lanes + i) * block_columns + static_cast<int>(threadIdx.x));
  }
  store_global(partials + (r * slots + slot) * width + column, sum);
}

}  // namespace dsnet::cuda
