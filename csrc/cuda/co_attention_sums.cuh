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

// Rows of `width` channels from rows that are padded to `padded`.
template <typename T>
__global__ void __launch_bounds__(256)
    co_attention_unpad(const T* x, int64_t padded, int64_t rows, int width, T* out) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= rows * width) return;
  store_global(out + i, load_global<T>(x + i / width * padded + i % width));
}

// The gradients of weight, bias, scale and shift from those of what co_attention_fold makes of
// them.
template <typename T>
__global__ void __launch_bounds__(NormBackward::columns* NormBackward::row_lanes)
    co_attention_unfold(const float* folded_weight, const float* folded_bias, Parameter weight,
        Parameter scale, Parameter shift, int rows, int width, float* grad_weight, float* grad_bias,
        float* grad_scale, float* grad_shift) {
  constexpr int block_columns = NormBackward::columns, lanes = NormBackward::row_lanes;
  __shared__ SharedArray<float, 2 * lanes * block_columns> exchange_storage;
  float* exchange = exchange_storage;
  const int column = static_cast<int>(blockIdx.x * block_columns + threadIdx.x);
  const int lane = static_cast<int>(threadIdx.y), x = static_cast<int>(threadIdx.x);
  float sums[2] = {};
  if (column < width) {
    const float factor = parameter_at<T>(scale, column, 1);
    const float term = parameter_at<T>(shift, column, 0);
    for (int row = lane; row < rows; row += lanes) {
      const int64_t at = int64_t{row} * width + column;
      const float of_weight = load_global<float>(folded_weight + at);
      const float of_bias = load_global<float>(folded_bias + row);
      const float value = parameter_at<T>(weight, at, 0);
      sums[0] = fmaf(of_weight, value, sums[0]);
      sums[1] = fmaf(of_bias, value, sums[1]);
      store_global(grad_weight + at, fmaf(of_weight, factor, of_bias * term));
      if (column == 0) store_global(grad_bias + row, of_bias);
    }
  }
  for (int r = 0; r < 2; ++r) {
    store_shared(exchange + (r * lanes + lane) * block_columns + x, sums[r]);
  }
  __syncthreads();
  if (lane >= 2 || column >= width) return;
  float sum = 0;
  for (int i = 0; i < lanes; ++i) {
    sum += load_shared<float>(exchange + (lane * lanes + i) * block_columns + x);
  }
  store_global((lane == 0 ? grad_scale : grad_shift) + column, sum);
}

}  // namespace dsnet::cuda
