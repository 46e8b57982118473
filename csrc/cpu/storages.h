// Storages that this compilation has kernels for. float64 is for checking gradients: the generic
// compilation alone has it; that for AVX-512-BF16 has what differs from AVX-512.
#pragma once

#include "storage.h"

// Defines Kernels name(Storage) from the variable or function template `kernels`; dispatch.h asks
// for no other storages.
#if defined(__AVX512BF16__)
#define DSNET_DEFINE_KERNELS(Kernels, name, kernels) \
  Kernels name(Storage) { return kernels<bfloat16>; }
#elif defined(__AVX2__)
#define DSNET_DEFINE_KERNELS(Kernels, name, kernels)            \
  Kernels name(Storage storage) {                               \
    if (storage == Storage::bfloat16) return kernels<bfloat16>; \
    return kernels<float>;                                      \
  }
#else
#define DSNET_DEFINE_KERNELS(Kernels, name, kernels)            \
  Kernels name(Storage storage) {                               \
    if (storage == Storage::float64) return kernels<double>;    \
    if (storage == Storage::bfloat16) return kernels<bfloat16>; \
    return kernels<float>;                                      \
  }
#endif
