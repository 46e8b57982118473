// For any C++ compiler.
#pragma once

#include <cstdint>

namespace dsnet::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dsnet::cuda
