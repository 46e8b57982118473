// Memory and parameters as a kernel's accumulators, for the instruction set of this compilation.
#pragma once

#include "arguments.h"
#include "vec.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

template <typename T>
using AccumulatorOf = typename Register<T>::type::Acc;

// Memory of a thread, taken piece by piece.
template <typename Acc>
struct Scratch {
  Acc* next;
  explicit Scratch(void* memory) : next(static_cast<Acc*>(memory)) {}
  Acc* take(int64_t count) {
    Acc* taken = next;
    next += padded(count);
    return taken;
  }
};

template <typename T>
const T* pixel_of(const Pixels& x, int64_t image, int64_t row, int64_t column) {
  return static_cast<const T*>(x.data) + image * x.stride_batch + row * x.stride_row +
         column * x.stride_column;
}

template <typename T, typename Acc>
Acc value_at(const Parameter& parameter, int64_t i) {
  return parameter.is_accumulator
             ? static_cast<const Acc*>(parameter.data)[i]
             : static_cast<Acc>(widened(static_cast<const T*>(parameter.data)[i]));
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
