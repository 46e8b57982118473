// The last step of sums over blocks without atomics.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsnet::cuda {

// sums[i] = Σ partials[slot][i], in an order that depends on the number of slots alone.
void sum_slots(
    const float* partials, int64_t slots, int64_t count, float* sums, CUstream_st* stream);

}  // namespace dsnet::cuda
