// What the bindings of every operator on the CPU share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/storage.h"

namespace dsnet {

inline cpu::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cpu::Storage::float32;
    case ScalarType::BFloat16: return cpu::Storage::bfloat16;
    case ScalarType::Double: return cpu::Storage::float64;
    default:
      throw std::runtime_error(std::string("x: expected float32, bfloat16 or float64, got ") +
                               torch::headeronly::toString(x.scalar_type()));
  }
}

// The value of a seed, 0 where there is none.
inline uint64_t seed_of(const OptionalTensor& seed) {
  return seed.has_value()
             ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()))
             : 0;
}

template <typename Acc, typename T>
void widen(const Tensor& contiguous, Acc* out) {
  const T* data = static_cast<const T*>(contiguous.const_data_ptr());
  std::copy(data, data + contiguous.numel(), out);
}

// A parameter's values as accumulators, in order; `absent` where there is none.
template <typename Acc>
std::vector<Acc> values_of(
    const char* name, const OptionalTensor& parameter, int64_t count, Acc absent) {
  std::vector<Acc> values(static_cast<size_t>(count), absent);
  if (!parameter.has_value()) return values;
  // Asked first, since a call of torch costs more than all the values.
  const Tensor contiguous =
      parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
  switch (contiguous.scalar_type()) {
    case ScalarType::Float: widen<Acc, float>(contiguous, values.data()); break;
    case ScalarType::BFloat16:
      widen<Acc, torch::headeronly::BFloat16>(contiguous, values.data());
      break;
    case ScalarType::Double:
      // Narrowing a float64 parameter beside a float32 x would lose digits unseen.
      if constexpr (std::is_same_v<Acc, double>) {
        widen<Acc, double>(contiguous, values.data());
        break;
      }
      [[fallthrough]];
    default:
      check(false, name, ": expected x's dtype or float32, got ",
          torch::headeronly::toString(contiguous.scalar_type()));
  }
  return values;
}

template <typename F>
void with_accumulator(cpu::Storage storage, const F& body) {
  if (storage == cpu::Storage::float64) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace dsnet
