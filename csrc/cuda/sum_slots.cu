#include "cuda/sum_slots.h"

#include "cuda/launch.cuh"

namespace dsnet::cuda {

struct SlotSum {
  static constexpr int values = 32;    // of a block, neighbours
  static constexpr int segments = 32;  // of the slots, interleaved
};

__global__ void __launch_bounds__(SlotSum::values* SlotSum::segments)
    sum_slots_kernel(const float* partials, int64_t slots, int64_t count, float* sums) {
  __shared__ SharedArray<float, SlotSum::values * SlotSum::segments> exchange;
  const int64_t i = int64_t{blockIdx.x} * SlotSum::values + threadIdx.x;
  float sum = 0;
  if (i < count) {
#pragma unroll 8
    for (int64_t slot = threadIdx.y; slot < slots; slot += SlotSum::segments) {
      sum += load_global<float>(partials + slot * count + i);
    }
  }
  store_shared(exchange + threadIdx.y * SlotSum::values + threadIdx.x, sum);
  __syncthreads();
  if (threadIdx.y > 0 || i >= count) return;
  for (int segment = 1; segment < SlotSum::segments; ++segment) {
    sum += load_shared<float>(exchange + segment * SlotSum::values + threadIdx.x);
  }
  store_global(sums + i, sum);
}

void sum_slots(
    const float* partials, int64_t slots, int64_t count, float* sums, CUstream_st* stream) {
  const auto blocks = static_cast<unsigned>((count + SlotSum::values - 1) / SlotSum::values);
  launch("sum_slots", sum_slots_kernel, {dim3{blocks}, dim3{SlotSum::values, SlotSum::segments}},
      stream, partials, slots, count, sums);
}

}  // namespace dsnet::cuda
