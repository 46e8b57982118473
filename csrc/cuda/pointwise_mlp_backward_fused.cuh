// The block's MLP on the GPU: backward of narrow tokens whose hidden activations were not kept. To
// be included by one translation unit.
//
// Two kernels recompute u and du, chunk by chunk in registers, so that nothing R wide is in memory:
//   pointwise_mlp_backward_fused          dx and sums over tokens; a block has 128 tokens
//   pointwise_mlp_backward_fused_weights  dW₁, db₁ and dW₂; a block has 64 or 128 hidden channels
//                                         and the tokens of a slot
// They share no result: with u and G·W₂ in both, two products more than the other form takes.
#pragma once

#include "cuda/pointwise_mlp_backward.cuh"

namespace dsnet::cuda {

// u becomes a, and its gradient du.
template <typename T, int groups, int tiles>
DSNET_DEVICE void apply_gelu(float (&before)[groups][tiles][4], float (&grad)[groups][tiles][4]) {
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const GeluFacts facts = gelu_facts<T>(before[g][t][i]);
        before[g][t][i] = facts.value;
        grad[g][t][i] *= facts.slope;
      }
    }
  }
}

// Shared memory of pointwise_mlp_backward_fused; `width` ≥ C. Limit of the chunk: registers.
template <typename T, int width>
struct TokensTile {
  static constexpr int tokens = MlpLaunch::channel_rows, chunk = width > 64 ? 16 : 32, stages = 3;
  static constexpr int token_values = tokens * row_stride<T, width>;
  static constexpr int weight_values = chunk * row_stride<T, width>;
  static constexpr size_t bytes = (2 * token_values + stages * 2 * weight_values) * sizeof(T);
  static_assert(12 * width * sizeof(float) <= bytes, "the sums of four warps fit");
};

// A warp has 32 tokens; du, as a result, is the left operand of du·W₁.
template <typename T, int width>
__global__ void __launch_bounds__(MlpLaunch::threads, 2)
    pointwise_mlp_backward_fused(const MlpBackward args, const MlpLaunch l) {
  using Tile = TokensTile<T, width>;
  constexpr int groups = 2, tiles = Tile::chunk / 8, stride = row_stride<T, width>;
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden;
  const int64_t tokens = args.shape.tokens, first = int64_t{blockIdx.x} * Tile::tokens;
  const auto x = dense<T>(args.x, tokens, channels), grad = dense<T>(args.grad, tokens, channels);
  const Factors factors{args.branch_scale, args.shape.pixels};
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x / 32);
  const int warp_row = warp * 16 * groups;
  T* normalized = dynamic_shared<T>();
  T* grad_branch = normalized + Tile::token_values;
  T* stages = grad_branch + Tile::token_values;
  load_affine<T, Tile::tokens, width>(
      normalized, x, first, args.scale, args.shift, Factors{}, l.packed);
  load_affine<T, Tile::tokens, width>(
      grad_branch, grad, first, Parameter{}, Parameter{}, factors, l.packed);

  const auto fc1 = dense<T>(args.fc1_weight, hidden, channels);
  const auto fc2 = dense<T>(args.fc2_transposed, hidden, channels);
  const auto copy = [&](int i, int stage) {
    using Copies = RowCopies<T, Tile::chunk, width>;
    T* to = stages + stage * 2 * Tile::weight_values;
    Copies(fc1, int64_t{i} * Tile::chunk, l.packed)(to, 0);
    Copies(fc2, int64_t{i} * Tile::chunk, l.packed)(to + Tile::weight_values, 0);
  };
  float result[groups][width / 8][4] = {};
  const auto chunks = static_cast<int>((hidden + Tile::chunk - 1) / Tile::chunk);
  for_each_tile_ahead<Tile::stages>(chunks, copy, [&](int i, int stage) {
    using Rows = SharedRows<T, width, groups>;
    const T* weights = stages + stage * 2 * Tile::weight_values;
    float before[groups][tiles][4], gradient[groups][tiles][4] = {};
    start_from_bias<T>(args.fc1_bias, int64_t{i} * Tile::chunk, hidden, before);
    multiply_groups_transposed<T, width>(Rows(normalized + warp_row * stride), weights, before);
    multiply_groups_transposed<T, width>(
        Rows(grad_branch + warp_row * stride), weights + Tile::weight_values, gradient);
    apply_gelu<T>(before, gradient);
    multiply_groups<T, Tile::chunk>(RoundedRows<T, groups, tiles>(gradient), weights, result);
  });

  // dx, and the sums of the warp's rows: G, dz·x and dz.
  float* exchange = dynamic_shared<float>();
#pragma unroll
  for (int part = 0; part < width / 32; ++part) {
    const int column = 32 * part + lane % 4 * 8, count = part_of_eight(column, channels);
    float scales[8] = {}, sums[3][8] = {};
    if (count > 0) load_parameter_eight<T>(args.scale, column, count, l.packed, 1, scales);
#pragma unroll
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float gradient[8], own[8], values[8];
        gather_row(result[g], 4 * part, half, gradient);
        const int64_t row = first + warp_row + 16 * g + lane / 4 + 8 * half;
        if (row >= tokens || count == 0) continue;
        const int64_t at = row * channels + column;
        const float factor = factors.at<T>(row);
        load_eight(grad.data + at, count, l.packed, own);
        load_eight(x.data + at, count, l.packed, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[0][i] = fmaf(factor, own[i], sums[0][i]);
          sums[1][i] = fmaf(gradient[i], values[i], sums[1][i]);
          sums[2][i] += gradient[i];
          own[i] = fmaf(scales[i], gradient[i], own[i]);
        }
        store_eight(static_cast<T*>(args.grad_x) + at, count, l.packed, own);
      }
    }
#pragma unroll
    for (int vector = 0; vector < 3; ++vector) {
      store_column_sums(sums[vector], exchange + (3 * warp + vector) * width + column);
    }
  }
  __syncthreads();
  const int64_t vector_values = l.channel_slots * channels;
  for (int i = static_cast<int>(threadIdx.x); i < 3 * width; i += MlpLaunch::threads) {
    if (i % width >= channels) continue;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < MlpLaunch::threads / 32; ++other) {
      sum += load_shared<float>(exchange + 3 * other * width + i);
    }
    float* partials = args.channel_partials + i / width * vector_values;
    store_global(partials + int64_t{blockIdx.x} * channels + i % width, sum);
  }
}

// Shared memory of pointwise_mlp_backward_fused_weights; `width` ≥ C. Limit of groups and step:
// registers.
template <typename T, int width>
struct WeightsTile {
  static constexpr int groups = width > 64 ? 1 : 2;  // of 16 hidden channels, of a warp
  static constexpr int step = width > 64 ? 32 : 16;  // tokens that a warp works on at a time
  static constexpr int hidden = 64 * groups, tokens = MlpLaunch::slot_tile, stages = 3;
  static_assert(hidden == MlpLaunch::fused_hidden(width), "as the launch counts blocks");
  static constexpr int weight_values = hidden * row_stride<T, width>;
  static constexpr int token_values = tokens * row_stride<T, width>;
  static constexpr size_t bytes = (2 * weight_values + stages * 2 * token_values) * sizeof(T);
};

// Transposed: a warp has 16 or 32 hidden channels, and of each tile of tokens uᵀ = W₁·zᵀ, whose
// layout as a result is that of the left operand of duᵀ·z.
template <typename T, int width>
__global__ void __launch_bounds__(MlpLaunch::threads, 2)
    pointwise_mlp_backward_fused_weights(const MlpBackward args, const MlpLaunch l) {
  using Tile = WeightsTile<T, width>;
  using OwnCopies = RowCopies<T, Tile::hidden, width>;
  using TokenCopies = RowCopies<T, Tile::tokens, width>;
  using Rows = SharedRows<T, width, Tile::groups>;
  constexpr int groups = Tile::groups, tiles = Tile::step / 8, stride = row_stride<T, width>;
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden;
  const auto hidden_blocks = static_cast<unsigned>((hidden + Tile::hidden - 1) / Tile::hidden);
  const int64_t first_hidden = int64_t{blockIdx.x % hidden_blocks} * Tile::hidden;
  const int64_t slot = blockIdx.x / hidden_blocks, begin = slot * l.tokens_of_slot;
  const int64_t behind = begin + l.tokens_of_slot;
  const int64_t end = behind < args.shape.tokens ? behind : args.shape.tokens;
  const Factors factors{args.branch_scale, args.shape.pixels};
  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x / 32) * 16 * groups;
  T* own_fc1 = dynamic_shared<T>();
  T* own_fc2 = own_fc1 + Tile::weight_values;
  T* stages = own_fc2 + Tile::weight_values;

  // The weights land with the first tile.
  OwnCopies(dense<T>(args.fc1_weight, hidden, channels), first_hidden, l.packed)(own_fc1, 0);
  OwnCopies(dense<T>(args.fc2_transposed, hidden, channels), first_hidden, l.packed)(own_fc2, 0);
  const auto copy = [&](int i, int stage) {
    T* to = stages + stage * 2 * Tile::token_values;
    const int64_t row = begin + int64_t{i} * Tile::tokens;
    TokenCopies(dense<T>(args.x, end, channels), row, l.packed)(to, 0);
    TokenCopies(dense<T>(args.grad, end, channels), row, l.packed)(to + Tile::token_values, 0);
  };
  // z and G in the place of x and grad, zero behind the last token. The shift alone may be more
  // than T holds, and infinity times zero is no number.
  const auto land = [&](int i, int stage) {
    T* tokens = stages + stage * 2 * Tile::token_values;
    const int column = TokenCopies::own_column(), count = part_of_eight(column, channels);
    if (count > 0 && (args.scale.data != nullptr || args.shift.data != nullptr)) {
      float scales[8], shifts[8];
      load_parameter_eight<T>(args.scale, column, count, l.packed, 1, scales);
      load_parameter_eight<T>(args.shift, column, count, l.packed, 0, shifts);
      TokenCopies::change(tokens, [&](int token, float (&values)[8]) {
        const bool is_real = begin + int64_t{i} * Tile::tokens + token < end;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k < count && is_real) values[k] = fmaf(scales[k], values[k], shifts[k]);
        }
      });
    }
    if (count > 0 && args.branch_scale.data != nullptr) {
      TokenCopies::change(tokens + Tile::token_values, [&](int token, float (&values)[8]) {
        const int64_t row = begin + int64_t{i} * Tile::tokens + token;
        const float factor = row < end ? factors.at<T>(row) : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] *= factor;
      });
    }
  };

  float bias[groups][2], bias_sums[groups][2] = {};
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t channel = first_hidden + warp_row + 16 * g + lane / 4 + 8 * half;
      bias[g][half] = channel < hidden ? parameter_at<T>(args.fc1_bias, channel, 0) : 0.0f;
    }
  }
  float fc1[groups][width / 8][4] = {}, fc2[groups][width / 8][4] = {};
  const auto count = static_cast<int>((end - begin + Tile::tokens - 1) / Tile::tokens);
  for_each_tile_ahead<Tile::stages>(count, copy, land, [&](int tile, int stage) {
    const int64_t left = end - begin - int64_t{tile} * Tile::tokens;
    const int tokens_left = left < Tile::tokens ? static_cast<int>(left) : Tile::tokens;
#pragma unroll 1
    for (int token = 0; token < Tile::tokens; token += Tile::step) {
      const T* normalized = stages + stage * 2 * Tile::token_values + token * stride;
      const T* grad_branch = normalized + Tile::token_values;
      float before[groups][tiles][4], gradient[groups][tiles][4] = {};
#pragma unroll
      for (int g = 0; g < groups; ++g) {
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Zero behind the last token, as z is: so may the bias be more than T holds.
            const int own = token + 8 * t + lane % 4 * 2 + i % 2;
            before[g][t][i] = own < tokens_left ? bias[g][i / 2] : 0.0f;
          }
        }
      }
      multiply_groups_transposed<T, width>(Rows(own_fc1 + warp_row * stride), normalized, before);
      multiply_groups_transposed<T, width>(
          Rows(own_fc2 + warp_row * stride), grad_branch, gradient);
      apply_gelu<T>(before, gradient);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) bias_sums[g][i / 2] += gradient[g][t][i];
        }
      }
      multiply_groups<T, Tile::step>(RoundedRows<T, groups, tiles>(gradient), normalized, fc1);
      multiply_groups<T, Tile::step>(RoundedRows<T, groups, tiles>(before), grad_branch, fc2);
    }
  });

#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t channel = first_hidden + warp_row + 16 * g + lane / 4 + 8 * half;
      const float sum = warp_sum(bias_sums[g][half], 4);
#pragma unroll
      for (int part = 0; part < width / 32; ++part) {
        float values[8];
        gather_row(fc1[g], 4 * part, half, values);
        const int column = 32 * part + lane % 4 * 8;
        const int columns = channel < hidden ? part_of_eight(column, channels) : 0;
        if (columns == 0) continue;
        store_eight(args.fc1_partials + (slot * hidden + channel) * channels + column, columns,
            l.packed, values);
      }
      if (channel >= hidden) continue;
      if (lane % 4 == 0) store_global(args.hidden_partials + slot * hidden + channel, sum);
      // Neighbouring hidden channels of one row of W₂ are in neighbouring lanes.
#pragma unroll
      for (int t = 0; t < width / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = 8 * t + lane % 4 * 2 + i;
          if (row >= channels) continue;
          store_global(args.fc2_partials + (slot * channels + row) * hidden + channel,
              fc2[g][t][2 * half + i]);
        }
      }
    }
  }
}

template <typename T, int width>
void launch_backward_fused(const MlpBackward& args, const MlpLaunch& l, cudaStream_t stream) {
  using Weights = WeightsTile<T, width>;
  const auto blocks = static_cast<unsigned>(l.channel_slots);
  launch("pointwise_mlp_backward_fused", pointwise_mlp_backward_fused<T, width>,
      {dim3{blocks}, dim3{MlpLaunch::threads}, TokensTile<T, width>::bytes}, stream, args, l);
  const int64_t weight_blocks = l.hidden_slots * divide_up(args.shape.hidden, Weights::hidden);
  launch("pointwise_mlp_backward_fused_weights", pointwise_mlp_backward_fused_weights<T, width>,
      {dim3{static_cast<unsigned>(weight_blocks)}, dim3{MlpLaunch::threads}, Weights::bytes},
      stream, args, l);
}

}  // namespace dsnet::cuda
