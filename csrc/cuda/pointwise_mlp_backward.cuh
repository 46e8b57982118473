// The block's MLP on the GPU: backward. To be included by one translation unit.
//
// With z, u and a as in the forward and G = branch_scale·grad,
//   du = (G·W₂)∘GELU'(u)   dz = du·W₁   dx = grad + scale·dz
//   dW₁ = duᵀ·z   db₁ = Σ du   dW₂ = Gᵀ·a   db₂ = Σ G   dscale = Σ dz·x   dshift = Σ dz
// pointwise_mlp_affine forms z and G, pointwise_mlp_backward_hidden du and a, with u as it was kept
// or recomputed, pointwise_mlp_backward_tokens dx and sums over tokens. Between them the plain
// products dz, dW₁ and dW₂ are cuBLAS's. Slab by slab, so that du and a stay small at any width.
#pragma once

#include "cuda/pointwise_mlp.cuh"
#include "cuda/sum_slots.h"

namespace dsnet::cuda {

// Eight columns' sums over the lanes that have the same ones, those with the same lane%4, to shared
// memory.
DSNET_DEVICE void store_column_sums(const float (&values)[8], float* shared) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = values[i];
#pragma unroll
    for (unsigned with = 16; with >= 4; with /= 2) sum += shuffle_xor(sum, with);
    if (lane_id() / 4 == i) store_shared(shared + i, sum);
  }
}

// What pointwise_mlp_backward_hidden reads and writes of a slab.
template <typename T>
struct HiddenGradient {
  Matrix<T> grad_branch;     // G
  Matrix<T> fc2_transposed;  // (R, C)
  const T* hidden;           // u, or null: recomputed from the next three
  Matrix<T> normalized;
  Matrix<T> fc1_weight;  // (R, C)
  Parameter fc1_bias;
  T* activated;
  T* grad_hidden;
  float* partials;  // (row blocks, R), of db₁
};

// A block leaves the column sums of its rows. The two products of `recomputes` take turns in shared
// memory.
template <typename T, typename Product, bool recomputes>
__global__ void __launch_bounds__(MlpLaunch::threads, recomputes ? 3 : Product::blocks)
    pointwise_mlp_backward_hidden(const HiddenGradient<T> args, bool packed) {
  constexpr int parts = Product::column_parts;
  static_assert(!recomputes || parts == 1, "the second result would take too many registers");
  const int64_t rows = args.grad_branch.rows, hidden = args.fc2_transposed.rows;
  const MlpPlace<Product> place(hidden);
  typename Product::Result before = {}, result = {};
  if constexpr (recomputes) {
    Product::compute(
        args.normalized, args.fc1_weight, place.first_row, place.first_column, packed, before);
  }
  Product::compute(
      args.grad_branch, args.fc2_transposed, place.first_row, place.first_column, packed, result);

  float sums[parts][8] = {};
  Product::for_each_eight(
      result, [&](int block_row, int block_column, int g, int half, int part, float (&values)[8]) {
        float own[8];
        if constexpr (recomputes) gather_row(before[g], 4 * part, half, own);
        const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
        const int count = row < rows ? part_of_eight(column, hidden) : 0;
        if (count == 0) return;
        const int64_t at = row * hidden + column;
        if constexpr (recomputes) {
          float bias[8];
          load_parameter_eight<T>(args.fc1_bias, column, count, packed, 0, bias);
#pragma unroll
          for (int i = 0; i < 8; ++i) own[i] += bias[i];
        } else {
          load_eight(args.hidden + at, count, packed, own);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const GeluFacts facts = gelu_facts<T>(own[i]);
          own[i] = facts.value;
          values[i] *= facts.slope;
          sums[part][i] += values[i];
        }
        store_eight(args.activated + at, count, packed, own);
        store_eight(args.grad_hidden + at, count, packed, values);
      });

  // Over the lanes with the same columns, then over the two warps.
  float* exchange = dynamic_shared<float>();
  const int warp_half = static_cast<int>(threadIdx.x / 64);
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const int column = Product::warp_column() + Product::column_of(part);
    store_column_sums(sums[part], exchange + warp_half * Product::columns + column);
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = place.first_column + thread;
  if (thread >= Product::columns || column >= hidden) return;
  const float sum = load_shared<float>(exchange + thread) +
                    load_shared<float>(exchange + Product::columns + thread);
  store_global(args.partials + place.first_row / Product::rows * hidden + column, sum);
}

// What pointwise_mlp_backward_tokens reads and writes of a slab; the partial sums of each vector
// are `vector` values behind the one's before.
template <typename T>
struct TokenGradient {
  Matrix<T> grad, grad_normalized;
  const T* x;
  Parameter scale;
  Factors factors;
  int64_t first_row;
  T* grad_x;
  float* partials;  // (row blocks, C) of db₂, dscale and dshift
  int64_t vector;
};

// Eight columns per thread; a block leaves the column sums of its rows.
template <typename T>
__global__ void __launch_bounds__(MlpLaunch::threads, 4)
    pointwise_mlp_backward_tokens(const TokenGradient<T> args, bool packed) {
  constexpr int columns = MlpLaunch::channel_columns, lanes = MlpLaunch::threads / (columns / 8);
  __shared__ SharedArray<float, 3 * lanes * columns> exchange;
  const int64_t rows = args.grad.rows, channels = args.grad.columns;
  const auto column_blocks = static_cast<unsigned>((channels + columns - 1) / columns);
  const int64_t first_row = int64_t{blockIdx.x / column_blocks} * MlpLaunch::channel_rows;
  const int64_t first_column = int64_t{blockIdx.x % column_blocks} * columns;
  const int thread = static_cast<int>(threadIdx.x), lane = thread / (columns / 8);
  const int block_column = thread % (columns / 8) * 8;
  const int64_t column = first_column + block_column;
  const int count = part_of_eight(column, channels);
  float scales[8] = {};
  if (count > 0) load_parameter_eight<T>(args.scale, column, count, packed, 1, scales);

  float sums[3][8] = {};
  for (int i = lane; i < MlpLaunch::channel_rows; i += lanes) {
    const int64_t row = first_row + i, at = row * channels + column;
    if (row >= rows || count == 0) break;
    float grad[8], normalized[8], x[8];
    load_eight(args.grad.data + at, count, packed, grad);
    load_eight(args.grad_normalized.data + at, count, packed, normalized);
    load_eight(args.x + at, count, packed, x);
    const float factor = args.factors.template at<T>(args.first_row + row);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sums[0][k] = fmaf(factor, grad[k], sums[0][k]);
      sums[1][k] = fmaf(normalized[k], x[k], sums[1][k]);
      sums[2][k] += normalized[k];
      grad[k] = fmaf(scales[k], normalized[k], grad[k]);
    }
    store_eight(args.grad_x + at, count, packed, grad);
  }
#pragma unroll
  for (int vector = 0; vector < 3; ++vector) {
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const Pack<float, 4> part{
          {sums[vector][k], sums[vector][k + 1], sums[vector][k + 2], sums[vector][k + 3]}};
      store_shared(exchange + (vector * lanes + lane) * columns + block_column + k, part);
    }
  }
  __syncthreads();
  for (int i = thread; i < 3 * columns; i += MlpLaunch::threads) {
    const int vector = i / columns;
    const int64_t own_column = first_column + i % columns;
    if (own_column >= channels) continue;
    float sum = 0;
    for (int other = 0; other < lanes; ++other) {
      sum += load_shared<float>(exchange + (vector * lanes + other) * columns + i % columns);
    }
    store_global(args.partials + vector * args.vector +
                     first_row / MlpLaunch::channel_rows * channels + own_column,
        sum);
  }
}

// Rows of a slab in what has those of all tokens.
template <typename T>
Matrix<T> rows_of(const void* data, const MlpSlab& slab, int64_t columns) {
  return dense<T>(static_cast<const T*>(data) + slab.first * columns, slab.tokens, columns);
}

template <typename T>
void launch_hidden(
    const MlpBackward& args, const MlpLaunch& l, const MlpSlab& slab, cudaStream_t stream) {
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden;
  auto normalized = rows_of<T>(args.x, slab, channels);
  auto grad_branch = rows_of<T>(args.grad, slab, channels);
  if (args.normalized != nullptr) {
    launch_affine(normalized, args.scale, args.shift, Factors{}, slab.first, l.packed,
        args.normalized, stream);
    normalized = dense<T>(args.normalized, slab.tokens, channels);
  }
  if (args.grad_branch != nullptr) {
    launch_affine(grad_branch, Parameter{}, Parameter{},
        Factors{args.branch_scale, args.shape.pixels}, slab.first, l.packed, args.grad_branch,
        stream);
    grad_branch = dense<T>(args.grad_branch, slab.tokens, channels);
  }
  const HiddenGradient<T> gradient{grad_branch, dense<T>(args.fc2_transposed, hidden, channels),
      args.hidden == nullptr ? nullptr : rows_of<T>(args.hidden, slab, hidden).data, normalized,
      dense<T>(args.fc1_weight, hidden, channels), args.fc1_bias, static_cast<T*>(args.activated),
      static_cast<T*>(args.grad_hidden),
      args.hidden_partials + slab.first / l.tokens_of_slot * hidden};
  with_product<T>(l.large_hidden, [&](auto product) {
    using Product = decltype(product);
    const auto grid = product_grid<Product>(slab.tokens, hidden);
    const char* name = "pointwise_mlp_backward_hidden";
    if constexpr (Product::column_parts == 1) {
      if (args.hidden == nullptr) {
        return launch(name, pointwise_mlp_backward_hidden<T, Product, true>, grid, stream, gradient,
            l.packed);
      }
    }
    launch(
        name, pointwise_mlp_backward_hidden<T, Product, false>, grid, stream, gradient, l.packed);
  });
}

}  // namespace dsnet::cuda
