// Rows of values, a register at a time, for the instruction set of this compilation.
#pragma once

#include "vec.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Calls body(load, store offset): whole registers across n values, then what is left.
template <typename V, typename Body>
inline void for_each_register(int64_t n, const Body& body) {
  int64_t c = 0;
  for (; c + V::size <= n; c += V::size) body(c, V::size);
  if (c < n) body(c, n - c);
}

template <typename V, typename T>
inline V load_part(const T* p, int64_t n) {
  return n == V::size ? V::load(p) : V::load(p, n);
}

template <typename V, typename T>
inline void store_part(const V& value, T* p, int64_t n) {
  if (n == V::size) {
    value.store(p);
  } else {
    value.store(p, n);
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
