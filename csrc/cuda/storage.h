// How activations and parameters are stored. For any C++ compiler.
#pragma once

#include <cstddef>

namespace dsnet::cuda {

enum class Storage { float32, bfloat16, float16 };

inline size_t bytes_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// Contiguous values of the activations' dtype or of float32; null where there is no such parameter.
struct Parameter {
  const void* data = nullptr;
  bool is_float32 = true;
};

}  // namespace dsnet::cuda
