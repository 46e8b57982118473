// What the kernels need beyond CUDA C++: memory accesses of a chosen width, warp primitives and
// inline PTX. Nothing else in this folder uses any of these.
//
// With DSNET_EMULATE each function has a twin that runs on the CPU and checks its use. Kernels
// touch global and shared memory through these functions alone, since a plain dereference goes
// unchecked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef DSNET_EMULATE
#include "emulator/warp.h"
#define DSNET_DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DSNET_DEVICE __device__ __forceinline__
#endif

namespace dsnet::cuda {

inline constexpr unsigned full_warp = 0xffffffffu;

// N values next to each other, moved by one instruction.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int size = N;
  T values[N];
};

// Memory.

#ifndef DSNET_EMULATE
namespace detail {

// The register type of one access of `bytes`.
template <size_t bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename V>
DSNET_DEVICE V from_word(typename Word<sizeof(V)>::type word) {
  V value;
  memcpy(&value, &word, sizeof(V));
  return value;
}
template <typename V>
DSNET_DEVICE typename Word<sizeof(V)>::type to_word(const V& value) {
  typename Word<sizeof(V)>::type word;
  memcpy(&word, &value, sizeof(V));
  return word;
}

}  // namespace detail
#endif

// A V in global memory that nothing writes during the kernel; aligned to its size.
template <typename V>
DSNET_DEVICE V load_global(const void* p) {
#ifdef DSNET_EMULATE
  emulator::check_load(emulator::Space::global, p, sizeof(V), sizeof(V));
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
#else
  return detail::from_word<V>(__ldg(static_cast<const typename detail::Word<sizeof(V)>::type*>(p)));
#endif
}

template <typename V>
DSNET_DEVICE void store_global(void* p, const V& value) {
#ifdef DSNET_EMULATE
  emulator::check_store(emulator::Space::global, p, sizeof(V), sizeof(V));
  std::memcpy(p, &value, sizeof(V));
#else
  *static_cast<typename detail::Word<sizeof(V)>::type*>(p) = detail::to_word(value);
#endif
}

template <typename V>
DSNET_DEVICE V load_shared(const void* p) {
#ifdef DSNET_EMULATE
  emulator::check_load(emulator::Space::shared, p, sizeof(V), sizeof(V));
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
#else
  return detail::from_word<V>(*static_cast<const typename detail::Word<sizeof(V)>::type*>(p));
#endif
}

template <typename V>
DSNET_DEVICE void store_shared(void* p, const V& value) {
#ifdef DSNET_EMULATE
  emulator::check_store(emulator::Space::shared, p, sizeof(V), sizeof(V));
  std::memcpy(p, &value, sizeof(V));
#else
  *static_cast<typename detail::Word<sizeof(V)>::type*>(p) = detail::to_word(value);
#endif
}

// A static shared array, declared `__shared__ SharedArray<T, N> name;` in a kernel.
template <typename T, size_t N>
struct SharedArray {
#ifdef DSNET_EMULATE
  SharedArray() : region(reinterpret_cast<std::byte*>(values), sizeof(values)) {}
  emulator::SharedRegion region;
#endif
  alignas(16) T values[N];
  DSNET_DEVICE operator T*() { return values; }
};

// The launch's dynamic shared memory.
template <typename T>
DSNET_DEVICE T* dynamic_shared() {
#ifdef DSNET_EMULATE
  return reinterpret_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char dsnet_dynamic_shared[];
  return reinterpret_cast<T*>(dsnet_dynamic_shared);
#endif
}

// Asynchronous copies.

// Copies `bytes` (4, 8 or 16) from global to shared memory; of these, those from source_bytes on
// become zero without being read. Lands at a wait_copies.
template <int bytes>
DSNET_DEVICE void copy_async(void* shared, const void* global, int source_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async moves 4, 8 or 16 bytes");
#ifdef DSNET_EMULATE
  emulator::current_block().copy_async(shared, global, bytes, static_cast<unsigned>(source_bytes));
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (bytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes),
        "r"(source_bytes)
        : "memory");
  }
#endif
}

// Closes the group of this thread's copies since the last one.
DSNET_DEVICE void commit_copies() {
#ifdef DSNET_EMULATE
  emulator::current_block().commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups_left` of this thread's groups are under way; for those of other
// threads a barrier must follow.
template <int groups_left>
DSNET_DEVICE void wait_copies() {
#ifdef DSNET_EMULATE
  emulator::current_block().wait_copies(groups_left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

// Warps.

DSNET_DEVICE void sync_warp(unsigned mask = full_warp) {
#ifdef DSNET_EMULATE
  emulator::current_block().warp_barrier(mask);
#else
  __syncwarp(mask);
#endif
}

// Value of lane `source` of the caller's segment of `width` lanes.
template <typename T>
DSNET_DEVICE T shuffle(T value, unsigned source, unsigned mask = full_warp, unsigned width = 32) {
#ifdef DSNET_EMULATE
  return emulator::shuffle<emulator::Shuffle::index>("shuffle", value, source, mask, width);
#else
  return __shfl_sync(mask, value, static_cast<int>(source), static_cast<int>(width));
#endif
}

template <typename T>
DSNET_DEVICE T shuffle_up(T value, unsigned by, unsigned mask = full_warp, unsigned width = 32) {
#ifdef DSNET_EMULATE
  return emulator::shuffle<emulator::Shuffle::up>("shuffle_up", value, by, mask, width);
#else
  return __shfl_up_sync(mask, value, by, static_cast<int>(width));
#endif
}

template <typename T>
DSNET_DEVICE T shuffle_down(T value, unsigned by, unsigned mask = full_warp, unsigned width = 32) {
#ifdef DSNET_EMULATE
  return emulator::shuffle<emulator::Shuffle::down>("shuffle_down", value, by, mask, width);
#else
  return __shfl_down_sync(mask, value, by, static_cast<int>(width));
#endif
}

template <typename T>
DSNET_DEVICE T shuffle_xor(T value, unsigned with, unsigned mask = full_warp, unsigned width = 32) {
#ifdef DSNET_EMULATE
  return emulator::shuffle<emulator::Shuffle::exclusive_or>(
      "shuffle_xor", value, with, mask, width);
#else
  return __shfl_xor_sync(mask, value, static_cast<int>(with), static_cast<int>(width));
#endif
}

// Lanes of the mask where the predicate holds.
DSNET_DEVICE unsigned ballot(bool predicate, unsigned mask = full_warp) {
#ifdef DSNET_EMULATE
  return emulator::ballot(predicate, mask);
#else
  return __ballot_sync(mask, predicate);
#endif
}

DSNET_DEVICE bool any(bool predicate, unsigned mask = full_warp) {
  return ballot(predicate, mask) != 0;
}

DSNET_DEVICE bool all(bool predicate, unsigned mask = full_warp) {
  return ballot(predicate, mask) == mask;
}

// Over segments of `width` lanes, a power of two; every lane has the result, summed in one order.
template <typename T>
DSNET_DEVICE T warp_sum(T value, unsigned width = 32) {
  for (unsigned with = width / 2; with > 0; with /= 2) value += shuffle_xor(value, with);
  return value;
}

template <typename T>
DSNET_DEVICE T warp_max(T value, unsigned width = 32) {
  for (unsigned with = width / 2; with > 0; with /= 2) {
    const T other = shuffle_xor(value, with);
    value = other > value ? other : value;
  }
  return value;
}

// Arithmetic.

// a·b, rounded before anything is added to it or subtracted from it. The compilers fuse a product
// and a sum into one rounding wherever they may.
DSNET_DEVICE float multiply_rounded(float a, float b) {
#ifdef DSNET_EMULATE
  // No compiler fuses across memory that it must not cache.
  const volatile float product = a * b;
  return product;
#else
  return __fmul_rn(a, b);
#endif
}

// 2^value to two units in the last place; subnormal results are zero.
DSNET_DEVICE float exp2_approx(float value) {
#ifdef DSNET_EMULATE
  const float power = std::exp2(value);
  return power < 0x1p-126f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
#endif
}

// Matrices.

// Loads `matrices` (1, 2 or 4) 8×8 matrices of 16-bit values; lane 8·m + r points at row r of
// matrix m, 16 bytes in shared memory.
template <bool transposed = false, int matrices>
DSNET_DEVICE void load_matrices(uint32_t (&result)[matrices], const void* row) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4, "ldmatrix loads 1, 2 or 4");
#ifdef DSNET_EMULATE
  emulator::ldmatrix<matrices, transposed>(result, row);
#else
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (matrices == 1 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
        : "=r"(result[0])
        : "r"(from)
        : "memory");
  } else if constexpr (matrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
        : "=r"(result[0])
        : "r"(from)
        : "memory");
  } else if constexpr (matrices == 2 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(result[0]), "=r"(result[1])
        : "r"(from)
        : "memory");
  } else if constexpr (matrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(result[0]), "=r"(result[1])
        : "r"(from)
        : "memory");
  } else if constexpr (!transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
        : "r"(from)
        : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
        : "r"(from)
        : "memory");
  }
#endif
}

// d += a·b for a (16, 16) and b (16, 8) of T, fp32 sums; fragments as in PTX's mma.m16n8k16.
template <typename T>
DSNET_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_half = std::is_same_v<T, __half>;
  static_assert(is_half || std::is_same_v<T, __nv_bfloat16>, "T: expected a 16-bit float");
#ifdef DSNET_EMULATE
  emulator::mma_16x8x16<T>(d, a, b, d);
#else
  if constexpr (is_half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The bits of a float rounded to tf32, ties away from zero.
DSNET_DEVICE uint32_t to_tf32(float value) {
#ifdef DSNET_EMULATE
  return emulator::round_tf32(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// d += a·b for a (16, 8) and b (8, 8) of tf32; of a float that is none, the low 13 bits are lost.
DSNET_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef DSNET_EMULATE
  emulator::mma_16x8x8_tf32(d, a, b, d);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace dsnet::cuda
