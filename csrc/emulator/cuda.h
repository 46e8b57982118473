// The part of CUDA C++ that the kernels use, for a host compiler: keywords, predefined variables,
// barriers, 16-bit floating point.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <utility>

#include "emulator/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
// One block runs at a time, so that its shared arrays may be static.
#define __shared__ static

using dim3 = dsnet::emulator::Index;
// A launch ends before it returns, on every stream.
using cudaStream_t = struct CUstream_st*;

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  dsnet::emulator::current_block().barrier(where.file_name(), where.line());
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// To nearest, ties to even; every NaN becomes 0x7fff, as on the device.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Puts the exponent in place, then 2^112 makes up for the difference of biases.
  const float magnitude = __uint_as_float(rest << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

// To nearest, ties to even; every NaN becomes 0x7fff, as on the device.
inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = __float_as_uint(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {
    // Below 2^-14: in units of 2^-24, rounded by the addition itself.
    const float units = __uint_as_float(rest) * 0x1p24f + 0x1p23f;
    return {static_cast<uint16_t>(sign | (__float_as_uint(units) & 0xffffu))};
  }
  const uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
