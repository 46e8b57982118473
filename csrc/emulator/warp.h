// Warp primitives and matrix instructions: what each computes from the operands of its lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator/cuda.h"

namespace dsnet::emulator {

// Where an instruction is that all lanes must execute together, `.sync.aligned` in PTX.
using Place = std::source_location;

inline constexpr uint32_t full_warp = 0xffffffffu;

enum class Shuffle { index, up, down, exclusive_or };

// Lane that `lane` reads; itself where that would leave its segment.
inline unsigned shuffle_source(Shuffle kind, unsigned lane, unsigned operand, unsigned width) {
  const unsigned begin = lane / width * width;
  const unsigned last = begin + width - 1;
  switch (kind) {
    case Shuffle::index: return begin + operand % width;
    case Shuffle::up: return lane >= begin + operand ? lane - operand : lane;
    case Shuffle::down: return lane + operand <= last ? lane + operand : lane;
    // A segment may read an earlier one, not a later one.
    case Shuffle::exclusive_or: return (lane ^ operand) <= last ? lane ^ operand : lane;
  }
  return lane;
}

template <Shuffle kind, typename T>
T shuffle(const char* name, T value, unsigned operand, uint32_t mask, unsigned width) {
  struct Operand {
    T value;
    unsigned operand, width;
    T result;
    int missing;
  } mine{value, operand, width, value, -1};
  Block& block = current_block();
  block.rendezvous(name, mask, &mine, [](void* const operands[warp_size], uint32_t lanes) {
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      auto& one = *static_cast<Operand*>(operands[lane]);
      const unsigned source = shuffle_source(kind, lane, one.operand, one.width);
      if (lanes >> source & 1) {
        const auto& other = *static_cast<Operand*>(operands[source]);
        if (other.width != one.width) {
          fail(std::string("mismatched shuffle: lane ") + std::to_string(lane) + " has width " +
               std::to_string(one.width) + ", lane " + std::to_string(source) + " has " +
               std::to_string(other.width));
        }
        one.result = other.value;
      } else {
        one.missing = static_cast<int>(source);
      }
    }
  });
  if (mine.missing >= 0) {
    fail(std::string(name) + ": reads lane " + std::to_string(mine.missing) +
         ", which is not in the mask");
  }
  return mine.result;
}

// Lanes of the mask whose predicate holds.
inline uint32_t ballot(bool predicate, uint32_t mask) {
  struct Operand {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  current_block().rendezvous(
      "ballot", mask, &mine, [](void* const operands[warp_size], uint32_t lanes) {
        uint32_t votes = 0;
        for (unsigned lane = 0; lane < warp_size; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          votes |= uint32_t{static_cast<Operand*>(operands[lane])->predicate} << lane;
        }
        for (unsigned lane = 0; lane < warp_size; ++lane) {
          if (lanes >> lane & 1) static_cast<Operand*>(operands[lane])->result = votes;
        }
      });
  return mine.result;
}

// Eight rows of 16 bytes are read at once unless two differ in the same four of the 32 banks.
inline void check_banks(const char* name, void* const rows[8], unsigned matrix) {
  unsigned passes = 1, in_bank[8] = {};
  for (unsigned r = 0; r < 8; ++r) {
    bool is_new = true;
    for (unsigned other = 0; other < r; ++other) is_new = is_new && rows[other] != rows[r];
    const unsigned bank = static_cast<unsigned>(reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8);
    if (is_new) passes = std::max(passes, ++in_bank[bank]);
  }
  if (passes == 1) return;
  fail(std::string("bank conflict: ") + name + " reads the rows of matrix " +
       std::to_string(matrix) + " in " + std::to_string(passes) + " passes");
}

// Lanes 8·m to 8·m + 7 address the rows of matrix m; lane l receives two neighbours of row l / 4,
// or of column l / 4 when transposed.
template <int matrices, bool transposed>
void ldmatrix(uint32_t (&result)[matrices], const void* row, const Place& place) {
  struct Operand {
    const void* row;
    uint32_t* result;
  } mine{row, result};
  if (current_block().lane() < 8 * matrices) check_load(Space::shared, row, 16, 16);
  static constexpr const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  const auto load = [](void* const operands[warp_size], uint32_t) {
    for (unsigned m = 0; m < matrices; ++m) {
      uint16_t matrix[8][8];
      void* rows[8];
      for (unsigned r = 0; r < 8; ++r) {
        rows[r] = const_cast<void*>(static_cast<Operand*>(operands[8 * m + r])->row);
        std::memcpy(matrix[r], rows[r], 16);
      }
      check_banks(name, rows, m);
      for (unsigned lane = 0; lane < warp_size; ++lane) {
        const unsigned major = lane / 4, minor = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[minor][major] : matrix[major][minor];
        const uint32_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        static_cast<Operand*>(operands[lane])->result[m] = low | high << 16;
      }
    }
  };
  current_block().rendezvous(name, full_warp, &mine, load, place.file_name(), place.line());
}

inline float low_value(uint32_t pair, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(pair)});
}
inline float low_value(uint32_t pair, __half) {
  return __half2float({static_cast<uint16_t>(pair)});
}

struct MmaOperand {
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
  float* d;
};

// d = a·b + c on 16×8 from the matrices that the lanes hold. Each dot product is rounded once,
// which is at least as exact as the device.
template <unsigned depth, typename Fill>
void multiply_matrices(void* const operands[warp_size], const Fill& fill) {
  float a[16][depth], b[depth][8];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    fill(lane / 4, lane % 4, *static_cast<MmaOperand*>(operands[lane]), a, b);
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const auto& one = *static_cast<MmaOperand*>(operands[lane]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = one.c[i];
      for (unsigned k = 0; k < depth; ++k) sum += double{a[row][k]} * double{b[k][column]};
      one.d[i] = static_cast<float>(sum);
    }
  }
}

// mma.m16n8k16, row-major a and column-major b of T, two to a register.
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
    const Place& place) {
  MmaOperand mine{a, b, c, d};
  const char* name = std::is_same_v<T, __half> ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16";
  const auto multiply = [](void* const operands[warp_size], uint32_t) {
    multiply_matrices<16>(operands,
        [](unsigned group, unsigned in_group, const MmaOperand& one, auto& left, auto& right) {
          for (unsigned half = 0; half < 2; ++half) {
            const unsigned shift = 16 * half;
            for (unsigned i = 0; i < 4; ++i) {
              left[group + i % 2 * 8][in_group * 2 + half + i / 2 * 8] =
                  low_value(one.a[i] >> shift, T{});
            }
            for (unsigned i = 0; i < 2; ++i) {
              right[in_group * 2 + half + i * 8][group] = low_value(one.b[i] >> shift, T{});
            }
          }
        });
  };
  current_block().rendezvous(name, full_warp, &mine, multiply, place.file_name(), place.line());
}

// To 10 bits of mantissa, ties away from zero; infinities and NaN keep their bits.
inline uint32_t round_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// The device drops the last 13 bits of a tf32 operand.
inline float truncate_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

// mma.m16n8k8 of tf32.
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
    const float (&c)[4], const Place& place) {
  MmaOperand mine{a, b, c, d};
  const auto multiply = [](void* const operands[warp_size], uint32_t) {
    multiply_matrices<8>(operands,
        [](unsigned group, unsigned in_group, const MmaOperand& one, auto& left, auto& right) {
          for (unsigned i = 0; i < 4; ++i) {
            left[group + i % 2 * 8][in_group + i / 2 * 4] = truncate_tf32(one.a[i]);
          }
          for (unsigned i = 0; i < 2; ++i) {
            right[in_group + i * 4][group] = truncate_tf32(one.b[i]);
          }
        });
  };
  current_block().rendezvous(
      "mma.m16n8k8.tf32", full_warp, &mine, multiply, place.file_name(), place.line());
}

}  // namespace dsnet::emulator
