// How activations are stored. For any C++ compiler.
#pragma once

#include <cstddef>

namespace dsnet::cuda {

enum class Storage { float32, bfloat16, float16 };

inline size_t bytes_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

}  // namespace dsnet::cuda
