// Kernels that reverse 64 floats with 64 threads, each in its own way and, with `fault`, each with
// one mistake that the emulator must report.
#pragma once

#include "cuda/ptx.cuh"

namespace dsnet::cuda::faults {

inline constexpr int count = 64;

DSNET_DEVICE float read(const float* p) { return load_global<float>(p); }

template <bool fault>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + i, read(in + i));
  if (!fault) __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

// The second round overwrites what a slower thread still has to read.
template <bool fault>
__global__ void missing_barrier_between_rounds(const float* in, float* out) {
  __shared__ SharedArray<float, count / 2> tile;
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (i / 32 == round) store_shared(tile + i % 32, read(in + i));
    __syncthreads();
    if (i / 32 != round) store_global(out + i, load_shared<float>(tile + (31 - i % 32)));
    if (!fault) __syncthreads();
  }
}

template <bool fault>
__global__ void missing_warp_barrier(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + i, read(in + i));
  if (!fault) sync_warp();
  const int mirrored = i ^ 31;
  store_global(out + (63 - mirrored), load_shared<float>(tile + mirrored));
}

template <bool fault>
__global__ void missing_wait(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  copy_async<4>(tile + i, in + i);
  commit_copies();
  if (!fault) wait_copies<0>();
  __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

// Two groups, of which the wait must cover both.
template <bool fault>
__global__ void short_wait(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    if (i < 8) copy_async<16>(tile + (32 * half + 4 * i), in + (32 * half + 4 * i));
    commit_copies();
  }
  constexpr int left = fault ? 1 : 0;
  wait_copies<left>();
  __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void missing_barrier_after_wait(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  copy_async<4>(tile + i, in + i);
  commit_copies();
  wait_copies<0>();
  if (!fault) __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void barrier_in_a_branch(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + i, read(in + i));
  if (!fault || i < 32) __syncthreads();
  if (!fault) store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void return_before_barrier(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + i, read(in + i));
  if (fault && i == 5) return;
  __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void two_barriers_for_one(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + i, read(in + i));
  if (fault && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void store_past_the_end(const float* in, float* out) {
  const int i = threadIdx.x;
  store_global(out + (63 - i + fault), read(in + i));
}

template <bool fault>
__global__ void shared_store_past_the_end(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  store_shared(tile + (i + fault), read(in + i));
  __syncthreads();
  if (!fault) store_global(out + i, load_shared<float>(tile + (63 - i)));
}

// The launch gives 256 bytes.
template <bool fault>
__global__ void dynamic_shared_past_the_end(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  const int i = threadIdx.x;
  store_shared(tile + (i + fault), read(in + i));
  __syncthreads();
  if (!fault) store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void store_to_an_input(const float* in, float* out) {
  const int i = threadIdx.x;
  store_global(fault ? const_cast<float*>(in) + i : out + i, read(in + (63 - i)));
}

template <bool fault>
__global__ void unwritten_shared_read(const float* in, float* out) {
  __shared__ SharedArray<float, count> tile;
  const int i = threadIdx.x;
  if (!fault || i > 0) store_shared(tile + i, read(in + i));
  __syncthreads();
  store_global(out + i, load_shared<float>(tile + (63 - i)));
}

template <bool fault>
__global__ void unwritten_global_read(const float* in, float* out) {
  const int i = threadIdx.x;
  store_global(out + i, read(fault ? out + (63 - i) : in + (63 - i)));
}

// What other threads store reaches a plain load in no order.
template <bool fault>
__global__ void load_of_what_the_kernel_stores(const float* in, float* out) {
  const int i = threadIdx.x;
  store_global(out + i, read(in + (63 - i)));
  __syncthreads();
  if (fault) read(out + (63 - i));
}

template <bool fault>
__global__ void two_stores_to_one_place(const float* in, float* out) {
  const int i = threadIdx.x;
  store_global(out + (fault ? i / 2 : i), read(in + (63 - i)));
}

template <bool fault>
__global__ void misaligned_vector_load(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i >= 16) return;
  auto pack = load_global<Pack<float, 4>>(in + 4 * i - (fault && i > 0));
  for (int k = 0; k < 4; ++k) store_global(out + (63 - 4 * i - k), pack.values[k]);
}

// Lanes 16 to 31 are in the mask and never come.
template <bool fault>
__global__ void lanes_that_never_come(const float* in, float* out) {
  const int i = threadIdx.x, lane = i % 32;
  float value = read(in + i);
  if (!fault || lane < 16) value = shuffle(value, 31 - lane);
  store_global(out + (63 - (i ^ 31)), value);
}

template <bool fault>
__global__ void mask_without_the_caller(const float* in, float* out) {
  const int i = threadIdx.x, lane = i % 32;
  const float value = shuffle(read(in + i), 31 - lane, fault ? 0x0000ffffu : full_warp);
  store_global(out + (63 - (i ^ 31)), value);
}

template <bool fault>
__global__ void source_outside_the_mask(const float* in, float* out) {
  const int i = threadIdx.x;
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float value = shuffle_xor(read(in + i), fault ? 31 : 15, half);
  store_global(out + (63 - (i ^ 15)), value);
}

template <bool fault>
__global__ void mismatched_shuffles(const float* in, float* out) {
  const int i = threadIdx.x;
  float value = read(in + i);
  if (fault && i % 32 < 16) {
    value = shuffle_down(value, 1);
  } else {
    value = shuffle_xor(value, 31);
  }
  store_global(out + (63 - (i ^ 31)), value);
}

// A matrix instruction must be one and the same for all lanes; here the product is zero.
template <bool fault>
__global__ void product_in_two_branches(const float* in, float* out) {
  const int i = threadIdx.x;
  const uint32_t left[4] = {}, right[2] = {};
  float sums[4] = {read(in + i)};
  if (fault && i % 2 == 1) {
    mma_16x8x16<__half>(sums, left, right);
  } else {
    mma_16x8x16<__half>(sums, left, right);
  }
  store_global(out + (63 - i), sums[0]);
}

// A warp's floats are an 8×8 matrix of halves; rows 128 bytes apart are in the same banks.
template <bool fault>
__global__ void rows_in_the_same_banks(const float* in, float* out) {
  constexpr int stride = fault ? 32 : 4;
  __shared__ SharedArray<float, 2 * 8 * 32> tile;
  const int i = threadIdx.x, lane = i % 32;
  float* own = tile + i / 32 * 8 * 32;
  store_shared(own + (lane / 4 * stride + lane % 4), read(in + i));
  sync_warp();
  uint32_t bits[1];
  load_matrices(bits, own + lane % 8 * stride);
  store_global(out + (63 - i), __uint_as_float(bits[0]));
}

}  // namespace dsnet::cuda::faults
