// Activations in memory and as accumulators.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/storage.h"

namespace dsnet::cuda {

// Calls body(zero of the storage type).
template <typename Body>
void with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::float32: return body(float{});
    case Storage::bfloat16: return body(__nv_bfloat16{});
    case Storage::float16: return body(__half{});
  }
}

DSNET_DEVICE float widen(float value) { return value; }
DSNET_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
DSNET_DEVICE float widen(__half value) { return __half2float(value); }

template <typename T, int N>
DSNET_DEVICE void widen(const Pack<T, N>& pack, float (&out)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    // A shift and a mask per pair, where the conversions would first take the pair apart.
    uint32_t pairs[N / 2];
    memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      out[2 * i] = __uint_as_float(pairs[i] << 16);
      out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = widen(pack.values[i]);
  }
}

DSNET_DEVICE void narrow(float value, float& out) { out = value; }
DSNET_DEVICE void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
DSNET_DEVICE void narrow(float value, __half& out) { out = __float2half_rn(value); }
DSNET_DEVICE void narrow(float x, float y, __nv_bfloat162& out) {
  out = __floats2bfloat162_rn(x, y);
}
DSNET_DEVICE void narrow(float x, float y, __half2& out) { out = __floats2half2_rn(x, y); }

// To nearest even.
template <typename T, int N>
DSNET_DEVICE Pack<T, N> narrow(const float (&values)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) narrow(values[2 * i], values[2 * i + 1], pairs[i]);
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(values[i], pack.values[i]);
  }
  return pack;
}

}  // namespace dsnet::cuda
