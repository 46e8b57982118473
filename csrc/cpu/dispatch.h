// The choice among an operation's kernels, which each instruction set compiles in its namespace for
// the storages of storages.h.
#pragma once

#include "capability.h"
#include "storage.h"

#define DSNET_KERNELS_OF(arch, Kernels, name) \
  namespace arch {                            \
  Kernels name(Storage storage);              \
  }

#ifdef DSNET_X86

#define DSNET_KERNELS_UP_TO_AVX512(Kernels, name) \
  DSNET_KERNELS_OF(generic, Kernels, name)        \
  DSNET_KERNELS_OF(avx2, Kernels, name)           \
  DSNET_KERNELS_OF(avx512, Kernels, name)

#define DSNET_CHOOSE_UP_TO_AVX512(capability, storage, name)            \
  if ((storage) == Storage::float64) return generic::name(storage);     \
  if ((capability) >= Capability::avx512) return avx512::name(storage); \
  if ((capability) == Capability::avx2) return avx2::name(storage);     \
  return generic::name(storage);

// Defines Kernels name(Capability, Storage); AVX-512-BF16 runs the kernels of AVX-512.
#define DSNET_DISPATCH(Kernels, name)                    \
  DSNET_KERNELS_UP_TO_AVX512(Kernels, name)              \
  Kernels name(Capability capability, Storage storage) { \
    DSNET_CHOOSE_UP_TO_AVX512(capability, storage, name) \
  }

// The same for kernels that AVX-512-BF16 has of its own, of bfloat16.
#define DSNET_DISPATCH_BF16(Kernels, name)                                       \
  DSNET_KERNELS_UP_TO_AVX512(Kernels, name)                                      \
  DSNET_KERNELS_OF(avx512_bf16, Kernels, name)                                   \
  Kernels name(Capability capability, Storage storage) {                         \
    if (capability == Capability::avx512_bf16 && storage == Storage::bfloat16) { \
      return avx512_bf16::name(storage);                                         \
    }                                                                            \
    DSNET_CHOOSE_UP_TO_AVX512(capability, storage, name)                         \
  }

#else

#define DSNET_DISPATCH(Kernels, name)      \
  DSNET_KERNELS_OF(generic, Kernels, name) \
  Kernels name(Capability, Storage storage) { return generic::name(storage); }
#define DSNET_DISPATCH_BF16 DSNET_DISPATCH

#endif
