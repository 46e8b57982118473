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

// Of a storage type.
template <typename T>
constexpr Storage storage_of = std::is_same_v<T, float>           ? Storage::float32
                               : std::is_same_v<T, __nv_bfloat16> ? Storage::bfloat16
                                                                  : Storage::float16;

DSNET_DEVICE float widen(float value) { return value; }
DSNET_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
DSNET_DEVICE float widen(__half value) { return __half2float(value); }

DSNET_DEVICE void widen_pair(uint32_t pair, __nv_bfloat16, float& x, float& y) {
  x = __uint_as_float(pair << 16);
  y = __uint_as_float(pair & 0xffff0000u);
}
DSNET_DEVICE void widen_pair(uint32_t pair, __half, float& x, float& y) {
  __half halves[2];
  memcpy(halves, &pair, sizeof(pair));
  x = __half2float(halves[0]);
  y = __half2float(halves[1]);
}

DSNET_DEVICE float narrow(float value, float) { return value; }
DSNET_DEVICE __nv_bfloat16 narrow(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }
DSNET_DEVICE __half narrow(float value, __half) { return __float2half_rn(value); }

DSNET_DEVICE uint32_t narrow_pair(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
DSNET_DEVICE uint32_t narrow_pair(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// N values of T as they travel: in whole registers where they fill them, since the compiler would
// take packs of 16-bit values apart and join them again.
template <typename T, int N>
using Stored =
    std::conditional_t<N * sizeof(T) % 4 == 0, Pack<uint32_t, N * sizeof(T) / 4>, Pack<T, N>>;

template <typename T, int N>
DSNET_DEVICE void widen(const Stored<T, N>& stored, float (&out)[N]) {
  if constexpr (N * sizeof(T) % 4 != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = widen(stored.values[i]);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      widen_pair(stored.values[i / 2], T{}, out[i], out[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(stored.values[i]);
  }
}

// To nearest even.
template <typename T, int N>
DSNET_DEVICE Stored<T, N> narrow(const float (&values)[N]) {
  Stored<T, N> stored;
  if constexpr (N * sizeof(T) % 4 != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) stored.values[i] = narrow(values[i], T{});
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      stored.values[i / 2] = narrow_pair(values[i], values[i + 1], T{});
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) stored.values[i] = __float_as_uint(values[i]);
  }
  return stored;
}

// Value i of a parameter, or `absent` where there is none.
template <typename T>
DSNET_DEVICE float parameter_at(const Parameter& parameter, int64_t i, float absent) {
  if (parameter.data == nullptr) return absent;
  if (parameter.is_float32)
    return load_global<float>(static_cast<const float*>(parameter.data) + i);
  return widen(load_global<T>(static_cast<const T*>(parameter.data) + i));
}

}  // namespace dsnet::cuda
