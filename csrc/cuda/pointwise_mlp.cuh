// The block's MLP on the GPU: forward. To be included by one translation unit.
//
// With z = scale·x + shift rounded to x's dtype, u = W₁·z + b₁ and a = GELU(u):
//   pointwise_mlp_fused     out from x, narrow tokens: u and a never leave registers
//   pointwise_mlp_affine    z, where there is an affine
//   pointwise_mlp_expand    a, and u where it is kept
//   pointwise_mlp_contract  out = x + branch_scale·(W₂·a + b₂)
// The last three run slab by slab, so that the intermediates stay small.
#pragma once

#include "cuda/pointwise_mlp_tiles.cuh"

namespace dsnet::cuda {

// out = factor·(scale·x + shift), eight channels per thread.
template <typename T>
__global__ void __launch_bounds__(256)
    pointwise_mlp_affine(const Matrix<T> x, const Parameter scale, const Parameter shift,
        const Factors factors, int64_t first_row, bool packed, T* out) {
  const int64_t units = (x.columns + 7) / 8;
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int64_t row = i / units, column = i % units * 8;
  if (row >= x.rows) return;
  const int count = part_of_eight(column, x.columns);
  const float factor = factors.at<T>(first_row + row);
  float values[8], scales[8], shifts[8];
  load_eight(x.data + row * x.stride + column, count, packed, values);
  load_parameter_eight<T>(scale, column, count, packed, 1, scales);
  load_parameter_eight<T>(shift, column, count, packed, 0, shifts);
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = factor * fmaf(scales[k], values[k], shifts[k]);
  store_eight(out + row * x.columns + column, count, packed, values);
}

// Shared memory of pointwise_mlp_fused; `width` ≥ C.
template <typename T, int width>
struct FusedTile {
  static constexpr int tokens = MlpLaunch::fused_tokens, chunk = width > 64 ? 16 : 32, stages = 3;
  static constexpr int token_values = tokens * row_stride<T, width>;
  static constexpr int fc1_values = chunk * row_stride<T, width>;
  static constexpr int stage_values = fc1_values + width * row_stride<T, chunk>;
  static constexpr size_t bytes = (token_values + stages * stage_values) * sizeof(T);
  static constexpr int blocks = width > 64 ? 2 : 3;  // that share a multiprocessor, likewise
};

// A warp has 32 tokens. Of each chunk of hidden channels it computes u, whose layout as a result is
// that of the second product's left operand.
template <typename T, int width>
__global__ void __launch_bounds__(MlpLaunch::threads, (FusedTile<T, width>::blocks))
    pointwise_mlp_fused(const MlpForward args, const MlpLaunch l) {
  using Tile = FusedTile<T, width>;
  constexpr int groups = 2, tiles = Tile::chunk / 8, stride = row_stride<T, width>;
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden;
  const int64_t tokens = args.shape.tokens, first = int64_t{blockIdx.x} * Tile::tokens;
  const T* x = static_cast<const T*>(args.x);
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16 * groups;
  T* normalized = dynamic_shared<T>();
  T* stages = normalized + Tile::token_values;

  load_affine<T, Tile::tokens, width>(normalized, dense<T>(x, tokens, channels), first, args.scale,
      args.shift, Factors{}, l.packed);
  const auto fc1 = dense<T>(args.fc1_weight, hidden, channels);
  const RowCopies<T, width, Tile::chunk> copy_fc2(
      dense<T>(args.fc2_weight, channels, hidden), 0, l.packed);
  const auto copy = [&](int i, int stage) {
    T* to = stages + stage * Tile::stage_values;
    const int64_t channel = int64_t{i} * Tile::chunk;
    RowCopies<T, Tile::chunk, width>(fc1, channel, l.packed)(to, 0);
    copy_fc2(to + Tile::fc1_values, channel);
  };
  float result[groups][width / 8][4] = {};
  const auto chunks = static_cast<int>((hidden + Tile::chunk - 1) / Tile::chunk);
  for_each_tile_ahead<Tile::stages>(chunks, copy, [&](int i, int stage) {
    const T* weights = stages + stage * Tile::stage_values;
    float before[groups][tiles][4];
    start_from_bias<T>(args.fc1_bias, int64_t{i} * Tile::chunk, hidden, before);
    multiply_groups_transposed<T, width>(
        SharedRows<T, width, groups>(normalized + warp_row * stride), weights, before);
#pragma unroll
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
#pragma unroll
        for (float& value : before[g][t]) value = gelu<T>(value);
      }
    }
    multiply_groups_transposed<T, Tile::chunk>(
        RoundedRows<T, groups, tiles>(before), weights + Tile::fc1_values, result);
  });

  const Factors factors{args.branch_scale, args.shape.pixels};
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + warp_row + 16 * g + lane / 4 + 8 * half;
      const float factor = row < tokens ? factors.at<T>(row) : 0.0f;
#pragma unroll
      for (int part = 0; part < width / 32; ++part) {
        float branch[8], values[8], bias[8];
        gather_row(result[g], 4 * part, half, branch);
        const int column = 32 * part + lane % 4 * 8;
        const int count = row < tokens ? part_of_eight(column, channels) : 0;
        if (count == 0) continue;
        load_eight(x + row * channels + column, count, l.packed, values);
        load_parameter_eight<T>(args.fc2_bias, column, count, l.packed, 0, bias);
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = fmaf(factor, branch[k] + bias[k], values[k]);
        store_eight(static_cast<T*>(args.out) + row * channels + column, count, l.packed, values);
      }
    }
  }
}

// Which rows and columns of the result a block works on; neighbours share the rows.
template <typename Product>
struct MlpPlace {
  int64_t first_row, first_column;

  DSNET_DEVICE explicit MlpPlace(int64_t columns) {
    const auto blocks = static_cast<unsigned>((columns + Product::columns - 1) / Product::columns);
    first_row = int64_t{blockIdx.x / blocks} * Product::rows;
    first_column = int64_t{blockIdx.x % blocks} * Product::columns;
  }
};

// activated = GELU(z·W₁ᵀ + b₁), and `hidden`, unless null, what is before GELU.
template <typename T, typename Product>
__global__ void __launch_bounds__(MlpLaunch::threads, Product::blocks)
    pointwise_mlp_expand(const Matrix<T> normalized, const Matrix<T> fc1_weight,
        const Parameter fc1_bias, bool packed, T* hidden, T* activated) {
  const MlpPlace<Product> place(fc1_weight.rows);
  typename Product::Result result = {};
  Product::compute(normalized, fc1_weight, place.first_row, place.first_column, packed, result);
  Product::for_each_eight(
      result, [&](int block_row, int block_column, int, int, int, const float (&product)[8]) {
        const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
        const int count = row < normalized.rows ? part_of_eight(column, fc1_weight.rows) : 0;
        if (count == 0) return;
        const int64_t at = row * fc1_weight.rows + column;
        float before[8], after[8];
        load_parameter_eight<T>(fc1_bias, column, count, packed, 0, before);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          before[i] += product[i];
          after[i] = gelu<T>(before[i]);
        }
        if (hidden != nullptr) store_eight(hidden + at, count, packed, before);
        store_eight(activated + at, count, packed, after);
      });
}

// out = x + factor·(activated·W₂ᵀ + b₂); rows of x and out begin at `first_row` of all.
template <typename T, typename Product>
__global__ void __launch_bounds__(MlpLaunch::threads, Product::blocks) pointwise_mlp_contract(
    const Matrix<T> activated, const Matrix<T> fc2_weight, const Parameter fc2_bias,
    const Factors factors, int64_t first_row, bool packed, const T* x, T* out) {
  const MlpPlace<Product> place(fc2_weight.rows);
  typename Product::Result result = {};
  Product::compute(activated, fc2_weight, place.first_row, place.first_column, packed, result);
  Product::for_each_eight(
      result, [&](int block_row, int block_column, int, int, int, const float (&product)[8]) {
        const int64_t row = place.first_row + block_row, column = place.first_column + block_column;
        const int count = row < activated.rows ? part_of_eight(column, fc2_weight.rows) : 0;
        if (count == 0) return;
        const int64_t at = row * fc2_weight.rows + column;
        const float factor = factors.at<T>(first_row + row);
        float values[8], bias[8];
        load_eight(x + at, count, packed, values);
        load_parameter_eight<T>(fc2_bias, column, count, packed, 0, bias);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = fmaf(factor, product[i] + bias[i], values[i]);
        store_eight(out + at, count, packed, values);
      });
}

template <typename T>
void launch_affine(const Matrix<T>& x, const Parameter& scale, const Parameter& shift,
    const Factors& factors, int64_t first_row, bool packed, void* out, cudaStream_t stream) {
  const int64_t blocks = divide_up(x.rows * divide_up(x.columns, 8), 256);
  launch("pointwise_mlp_affine", pointwise_mlp_affine<T>,
      {dim3{static_cast<unsigned>(blocks)}, dim3{256}}, stream, x, scale, shift, factors, first_row,
      packed, static_cast<T*>(out));
}

// Calls body(the product's type): large blocks only where they exist.
template <typename T, typename Body>
void with_product(bool is_large, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    if (is_large) return body(LargeProduct128<T>{});
  }
  body(SmallProduct64<T>{});
}

template <typename Product>
Grid product_grid(int64_t rows, int64_t columns) {
  const int64_t blocks = divide_up(rows, Product::rows) * divide_up(columns, Product::columns);
  return {dim3{static_cast<unsigned>(blocks)}, dim3{MlpLaunch::threads}, Product::bytes};
}

template <typename T>
void forward_slab(
    const MlpForward& args, const MlpLaunch& l, const MlpSlab& slab, cudaStream_t stream) {
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden;
  const int64_t rows = slab.tokens, offset = slab.first * channels;
  auto normalized = dense<T>(static_cast<const T*>(args.x) + offset, rows, channels);
  if (args.normalized != nullptr) {
    launch_affine(normalized, args.scale, args.shift, Factors{}, slab.first, l.packed,
        args.normalized, stream);
    normalized = dense<T>(args.normalized, rows, channels);
  }
  T* kept = static_cast<T*>(args.hidden);
  if (kept != nullptr) kept += slab.first * hidden;
  with_product<T>(l.large_hidden, [&](auto product) {
    using Product = decltype(product);
    launch("pointwise_mlp_expand", pointwise_mlp_expand<T, Product>,
        product_grid<Product>(rows, hidden), stream, normalized,
        dense<T>(args.fc1_weight, hidden, channels), args.fc1_bias, l.packed, kept,
        static_cast<T*>(args.activated));
  });
  with_product<T>(l.large_out, [&](auto product) {
    using Product = decltype(product);
    launch("pointwise_mlp_contract", pointwise_mlp_contract<T, Product>,
        product_grid<Product>(rows, channels), stream, dense<T>(args.activated, rows, hidden),
        dense<T>(args.fc2_weight, channels, hidden), args.fc2_bias,
        Factors{args.branch_scale, args.shape.pixels}, slab.first, l.packed,
        static_cast<const T*>(args.x) + offset, static_cast<T*>(args.out) + offset);
  });
}

template <typename T, int width>
void launch_fused(const MlpForward& args, const MlpLaunch& l, cudaStream_t stream) {
  const int64_t blocks = divide_up(args.shape.tokens, MlpLaunch::fused_tokens);
  launch("pointwise_mlp_fused", pointwise_mlp_fused<T, width>,
      {dim3{static_cast<unsigned>(blocks)}, dim3{MlpLaunch::threads}, FusedTile<T, width>::bytes},
      stream, args, l);
}

// Compiled by pointwise_mlp.cu.
#define DSNET_MLP_AFFINE(declared, T)                                                           \
  declared template void launch_affine<T>(const Matrix<T>&, const Parameter&, const Parameter&, \
      const Factors&, int64_t, bool, void*, cudaStream_t)

DSNET_MLP_AFFINE(extern, float);
DSNET_MLP_AFFINE(extern, __nv_bfloat16);
DSNET_MLP_AFFINE(extern, __half);

// Compiled by pointwise_mlp_fused.cu.
#define DSNET_MLP_FUSED(declared, T)                                                             \
  declared template void launch_fused<T, 64>(const MlpForward&, const MlpLaunch&, cudaStream_t); \
  declared template void launch_fused<T, 128>(const MlpForward&, const MlpLaunch&, cudaStream_t)

DSNET_MLP_FUSED(extern, __nv_bfloat16);
DSNET_MLP_FUSED(extern, __half);

}  // namespace dsnet::cuda
