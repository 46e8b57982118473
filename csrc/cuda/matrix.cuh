// Matrices in global memory, and what is known of their rows and columns.
#pragma once

#include "common/anywhere.h"
#include "cuda/fragments.cuh"

namespace dsnet::cuda {

// Rows of `columns` values, `stride` apart.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

// Rows next to each other.
template <typename T>
DSNET_ANYWHERE Matrix<T> dense(const void* data, int64_t rows, int64_t columns) {
  return {static_cast<const T*>(data), rows, columns, columns};
}

// branch_scale, one factor for `rows` rows of an image.
struct Factors {
  Parameter values;
  int64_t rows;

  template <typename T>
  DSNET_DEVICE float at(int64_t row) const {
    return values.data == nullptr ? 1.0f : parameter_at<T>(values, row / rows, 1);
  }
};

// How many of the eight values from `column` on there are.
DSNET_DEVICE int part_of_eight(int64_t column, int64_t columns) {
  const int64_t left = columns - column;
  return left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
}

// Eight neighbours of a parameter, `absent` where there is none.
template <typename T>
DSNET_DEVICE void load_parameter_eight(const Parameter& parameter, int64_t column, int count,
    bool packed, float absent, float (&out)[8]) {
  if (parameter.data == nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = absent;
  } else if (parameter.is_float32) {
    load_eight(static_cast<const float*>(parameter.data) + column, count, packed, out);
  } else {
    load_eight(static_cast<const T*>(parameter.data) + column, count, packed, out);
  }
}

}  // namespace dsnet::cuda
