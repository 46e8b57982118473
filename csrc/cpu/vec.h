// A register of accumulators, and bfloat16 in memory, for the instruction set of this compilation.
//
// DSNET_CPU_ARCH names the namespace, so that each compilation's code stays its own: nothing here
// or in a kernel may instantiate a function template of the standard library, which the linker
// would merge across instruction sets.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef DSNET_CPU_ARCH
#error "define DSNET_CPU_ARCH to generic, avx2, avx512 or avx512_bf16"
#endif

namespace dsnet::cpu {

// Storage only: arithmetic is in float.
struct bfloat16 {
  uint16_t bits;
};

}  // namespace dsnet::cpu

namespace dsnet::cpu::DSNET_CPU_ARCH {

template <int N>
struct Constant {
  static constexpr int value = N;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// Accumulators of stored values.
inline float widened(bfloat16 value) { return to_float(value); }
inline float widened(float value) { return value; }
inline double widened(double value) { return value; }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }
inline float error_function(float x) { return __builtin_erff(x); }
inline double error_function(double x) { return __builtin_erf(x); }

// Round to nearest even; NaN stays NaN.
inline bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__AVX512F__)

struct VecF32 {
  using Acc = float;
  static constexpr int size = 16;
  __m512 v;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static VecF32 zero() { return {_mm512_setzero_ps()}; }
  static VecF32 fill(float value) { return {_mm512_set1_ps(value)}; }
  static VecF32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecF32 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static VecF32 load(const bfloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static VecF32 load(const bfloat16* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  // Lanes from n on replaced.
  VecF32 with_rest(int64_t n, VecF32 rest) const {
    return {_mm512_mask_blend_ps(first(n), rest.v, v)};
  }
  // The value, in a register from here on.
  void keep() { asm("" : "+v"(v)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(bfloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
#if defined(__AVX512BF16__)
  // By the conversion instruction, which flushes subnormals, as products of pairs do.
  void store_rounded(bfloat16* p) const {
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  }
#endif

 private:
  static VecF32 widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // In integers, since the conversion instruction would flush subnormals.
  __m256i narrow() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

inline VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF32 operator+(VecF32 a, VecF32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF32 operator-(VecF32 a, VecF32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF32 operator*(VecF32 a, VecF32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF32 operator/(VecF32 a, VecF32 b) { return {_mm512_div_ps(a.v, b.v)}; }
// NaN where b is.
inline VecF32 larger(VecF32 a, VecF32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecF32 least(VecF32 a, VecF32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum_of(VecF32 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest_of(VecF32 a) { return _mm512_reduce_max_ps(a.v); }
inline VecF32 rounded(VecF32 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline VecF32 magnitude(VecF32 a) { return {_mm512_abs_ps(a.v)}; }
inline VecF32 with_sign_of(VecF32 a, VecF32 sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_xor_ps(a.v, _mm512_and_ps(sign.v, bit))};
}
// Of 16 values, those at the lowest four bits of each word of `index`.
inline VecF32 lookup(const float* table, VecF32 index) {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(index.v), _mm512_load_ps(table))};
}

// 16 rows of 16 values, transposed.
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  // Within 128-bit lanes: pairs of rows, then fours.
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d b0 = _mm512_castps_pd(b[i]), b1 = _mm512_castps_pd(b[i + 1]);
    const __m512d b2 = _mm512_castps_pd(b[i + 2]), b3 = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(b0, b2));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(b0, b2));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b1, b3));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b1, b3));
  }
  // Lanes: a[4g + c] holds in lane l column 4l + c of rows 4g … 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}

// a · 2ⁿ for whole n.
inline VecF32 scaled_by_power(VecF32 a, VecF32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

#elif defined(__AVX2__)

struct VecF32 {
  using Acc = float;
  static constexpr int size = 8;
  __m256 v;

  static __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }

  static VecF32 zero() { return {_mm256_setzero_ps()}; }
  static VecF32 fill(float value) { return {_mm256_set1_ps(value)}; }
  static VecF32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecF32 load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static VecF32 load(const bfloat16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static VecF32 load(const bfloat16* p, int64_t n) {
    bfloat16 lanes[size] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  VecF32 with_rest(int64_t n, VecF32 rest) const {
    return {_mm256_blendv_ps(rest.v, v, _mm256_castsi256_ps(first(n)))};
  }
  void keep() { asm("" : "+x"(v)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  void store(bfloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(bfloat16* p, int64_t n) const {
    bfloat16 lanes[size];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }

 private:
  static VecF32 widen(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

inline VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF32 operator+(VecF32 a, VecF32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF32 operator-(VecF32 a, VecF32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF32 operator*(VecF32 a, VecF32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF32 operator/(VecF32 a, VecF32 b) { return {_mm256_div_ps(a.v, b.v)}; }
// NaN where b is.
inline VecF32 larger(VecF32 a, VecF32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VecF32 least(VecF32 a, VecF32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float sum_of(VecF32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest_of(VecF32 a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline VecF32 rounded(VecF32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline VecF32 magnitude(VecF32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VecF32 with_sign_of(VecF32 a, VecF32 sign) {
  return {_mm256_xor_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
// Of 16 values, those at the lowest four bits of each word of `index`.
inline VecF32 lookup(const float* table, VecF32 index) {
  const __m256i bits = _mm256_castps_si256(index.v);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), bits);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), bits);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28)))};
}
// a · 2ⁿ for whole n of −126 … 127.
inline VecF32 scaled_by_power(VecF32 a, VecF32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

#endif

#if defined(__AVX2__)

// eˣ to about one unit in the last place, for x at most 88; from −87 down 1e−38 or less.
inline VecF32 exp(VecF32 x) {
  // Each maximum and minimum keeps a NaN.
  x = larger(VecF32::fill(-87.0f), x);
  const VecF32 n = rounded(x * VecF32::fill(1.44269504088896341f));
  // x − n·ln 2, the logarithm in two parts.
  VecF32 r = fma(n, VecF32::fill(-0.693359375f), x);
  r = fma(n, VecF32::fill(2.12194440e-4f), r);
  // 1 + r + r²·p(r), p the minimax polynomial on ±ln 2 / 2.
  VecF32 p = VecF32::fill(1.381459180e-3f);
  p = fma(p, r, VecF32::fill(8.368716575e-3f));
  p = fma(p, r, VecF32::fill(4.166838899e-2f));
  p = fma(p, r, VecF32::fill(1.666652113e-1f));
  p = fma(p, r, VecF32::fill(4.999999404e-1f));
  p = fma(p, r * r, r + VecF32::fill(1.0f));
  return scaled_by_power(p, n);
}

#endif

// The same in portable C++, which compilers turn into whatever registers there are.
template <typename A>
struct VecGeneric {
  using Acc = A;
  static constexpr int size = 8;
  A v[size];

  static VecGeneric zero() { return VecGeneric{}; }
  static VecGeneric fill(A value) {
    VecGeneric result;
    for (int i = 0; i < size; ++i) result.v[i] = value;
    return result;
  }
  template <typename T>
  static VecGeneric load(const T* p, int64_t n = size) {
    VecGeneric result{};
    for (int64_t i = 0; i < n; ++i) result.v[i] = get(p[i]);
    return result;
  }
  VecGeneric with_rest(int64_t n, VecGeneric rest) const {
    for (int64_t i = 0; i < n; ++i) rest.v[i] = v[i];
    return rest;
  }
  void keep() {}
  template <typename T>
  void store(T* p, int64_t n = size) const {
    for (int64_t i = 0; i < n; ++i) put(p + i, v[i]);
  }

 private:
  static A get(A value) { return value; }
  static A get(bfloat16 value) { return to_float(value); }
  static void put(A* p, A value) { *p = value; }
  static void put(bfloat16* p, A value) { *p = to_bfloat16(value); }
};

template <typename A>
inline VecGeneric<A> fma(VecGeneric<A> a, VecGeneric<A> b, VecGeneric<A> c) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}

template <typename A>
inline VecGeneric<A> operator+(VecGeneric<A> a, VecGeneric<A> b) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) a.v[i] += b.v[i];
  return a;
}

template <typename A>
inline VecGeneric<A> operator-(VecGeneric<A> a, VecGeneric<A> b) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) a.v[i] -= b.v[i];
  return a;
}

template <typename A>
inline VecGeneric<A> operator*(VecGeneric<A> a, VecGeneric<A> b) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) a.v[i] *= b.v[i];
  return a;
}

template <typename A>
inline VecGeneric<A> operator/(VecGeneric<A> a, VecGeneric<A> b) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) a.v[i] /= b.v[i];
  return a;
}

template <typename A>
inline VecGeneric<A> larger(VecGeneric<A> a, VecGeneric<A> b) {
  for (int i = 0; i < VecGeneric<A>::size; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

template <typename A>
inline A sum_of(VecGeneric<A> a) {
  A sum = 0;
  for (int i = 0; i < VecGeneric<A>::size; ++i) sum += a.v[i];
  return sum;
}

template <typename A>
inline A largest_of(VecGeneric<A> a) {
  A largest = a.v[0];
  for (int i = 1; i < VecGeneric<A>::size; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}

inline VecGeneric<float> exp(VecGeneric<float> x) {
  for (int i = 0; i < VecGeneric<float>::size; ++i) x.v[i] = __builtin_expf(x.v[i]);
  return x;
}

inline VecGeneric<double> exp(VecGeneric<double> x) {
  for (int i = 0; i < VecGeneric<double>::size; ++i) x.v[i] = __builtin_exp(x.v[i]);
  return x;
}

// The register that accumulates for values stored as T.
template <typename T>
struct Register {
#if defined(__AVX2__)
  using type = VecF32;
#else
  using type = VecGeneric<float>;
#endif
};

template <>
struct Register<double> {
  using type = VecGeneric<double>;
};

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
