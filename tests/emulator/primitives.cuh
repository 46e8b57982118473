// One warp that applies one primitive, for comparison with its definition in numpy.
#pragma once

#include "cuda/ptx.cuh"

namespace dsnet::cuda::primitives {

enum class Shuffle { index, up, down, exclusive_or };

template <typename T>
__global__ void shuffles(
    Shuffle kind, const T* in, const unsigned* operands, unsigned width, T* out) {
  const unsigned lane = threadIdx.x;
  const T value = load_global<T>(in + lane);
  const unsigned operand = load_global<unsigned>(operands + lane);
  T result{};
  switch (kind) {
    case Shuffle::index: result = shuffle(value, operand, full_warp, width); break;
    case Shuffle::up: result = shuffle_up(value, operand, full_warp, width); break;
    case Shuffle::down: result = shuffle_down(value, operand, full_warp, width); break;
    case Shuffle::exclusive_or: result = shuffle_xor(value, operand, full_warp, width); break;
  }
  store_global(out + lane, result);
}

// Per lane: votes of the two halves of the warp apart, any, all, and a sum and maximum over
// segments of `width`.
__global__ void votes(const int* in, unsigned width, int* out) {
  const unsigned lane = threadIdx.x;
  const int value = load_global<int>(in + lane);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const int results[5] = {static_cast<int>(ballot(value > 0, half)), any(value > 5),
      all(value > -5), warp_sum(value, width), warp_max(value, width)};
  for (int k = 0; k < 5; ++k) store_global(out + (5 * lane + k), results[k]);
}

// (matrices, 8, 8) 16-bit values to (32, matrices) registers.
template <bool transposed, int matrices>
__global__ void loads_of_matrices(const uint16_t* in, uint32_t* out) {
  __shared__ SharedArray<uint16_t, 4 * 64> tile;
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 64 * matrices; i += 32) {
    store_shared(tile + i, load_global<uint16_t>(in + i));
  }
  sync_warp();
  uint32_t registers[matrices];
  load_matrices<transposed>(registers, tile + lane % (8 * matrices) * 8);
  for (int m = 0; m < matrices; ++m) store_global(out + (lane * matrices + m), registers[m]);
}

// Where value i of a lane lies in a 16×8 matrix of sums.
DSNET_DEVICE unsigned sum_index(unsigned lane, int i) {
  return (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
}

// d (16, 8) = a (16, 16) · b (16, 8) + c, a and b through ldmatrix.
template <typename T>
__global__ void product_of_16_bit(const T* a, const T* b, const float* c, float* d) {
  // Eight more than a row has: without them two rows of eight share banks.
  constexpr unsigned stride = 16 + 8;
  __shared__ SharedArray<T, 16 * stride> left;
  __shared__ SharedArray<T, 16 * 8> right;
  const unsigned lane = threadIdx.x;
  copy_async<16>(left + (lane / 2 * stride + lane % 2 * 8), a + 8 * lane);
  if (lane < 16) copy_async<16>(right + 8 * lane, b + 8 * lane);
  commit_copies();
  wait_copies<0>();
  sync_warp();
  uint32_t left_registers[4], right_registers[2];
  load_matrices(left_registers, left + (lane % 16 * stride + lane / 16 * 8));
  load_matrices<true>(right_registers, right + lane % 16 * 8);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = load_global<float>(c + sum_index(lane, i));
  mma_16x8x16<T>(sums, left_registers, right_registers);
  for (int i = 0; i < 4; ++i) store_global(d + sum_index(lane, i), sums[i]);
}

// d (16, 8) = a (16, 8) · b (8, 8) + c; the operands as they are, or rounded to tf32 before.
__global__ void product_of_tf32(
    const float* a, const float* b, const float* c, bool rounded, float* d) {
  const unsigned lane = threadIdx.x, group = lane / 4, k = lane % 4;
  const auto bits = [&](const float* p) {
    return rounded ? to_tf32(load_global<float>(p)) : load_global<uint32_t>(p);
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = bits(a + (group + i % 2 * 8) * 8 + k + i / 2 * 4);
  for (int i = 0; i < 2; ++i) right[i] = bits(b + (k + i * 4) * 8 + group);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = load_global<float>(c + sum_index(lane, i));
  mma_16x8x8_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) store_global(d + sum_index(lane, i), sums[i]);
}

// 16 bytes per lane, of which the first sizes[lane] come from memory and the others are zero.
__global__ void zero_fill(const uint8_t* in, const int* sizes, uint8_t* out) {
  __shared__ SharedArray<uint8_t, 32 * 16> tile;
  const unsigned lane = threadIdx.x;
  copy_async<16>(tile + 16 * lane, in + 16 * lane, load_global<int>(sizes + lane));
  commit_copies();
  wait_copies<0>();
  store_global(out + 16 * lane, load_shared<Pack<uint8_t, 16>>(tile + 16 * lane));
}

// Which block and thread ran, in the order in which they ran; one element per thread.
__global__ void order_of_threads(const int* in, int* out, int* next) {
  const int place = *next;
  *next = place + 1;
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  store_global(out + place, load_global<int>(in + id));
}

}  // namespace dsnet::cuda::primitives
