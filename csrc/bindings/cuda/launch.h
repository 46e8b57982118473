// What the bindings of every operator on NVIDIA GPUs share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet {

inline cuda::Storage storage_of(const Tensor& x, const char* name = "x") {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cuda::Storage::float32;
    case ScalarType::BFloat16: return cuda::Storage::bfloat16;
    case ScalarType::Half: return cuda::Storage::float16;
    default:
      throw std::runtime_error(std::string(name) + ": expected float32, bfloat16 or float16, got " +
                               torch::headeronly::toString(x.scalar_type()));
  }
}

inline void check_device(
    const char* name, const Tensor& tensor, const Tensor& x, const char* x_name = "x") {
  check(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name, ": expected ",
      x_name, "'s device");
}

inline Tensor empty_beside(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, x.device());
}

inline float* float_data(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// (B, C, H, W) as contiguous (B, H, W, C), as it is or copied.
inline Tensor as_channels_last(const Tensor& x) {
  int64_t expected = 1;
  bool is_channels_last = true;
  for (int64_t d : {1, 3, 2, 0}) {
    is_channels_last = is_channels_last && (x.size(d) == 1 || x.stride(d) == expected);
    expected *= x.size(d);
  }
  if (is_channels_last) return x;
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// The device of a call made current, and torch's stream on it: kernels are launched with both.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_;
};

// A parameter's contiguous values, alive as long as this is.
class Values {
 public:
  Values(const char* name, const OptionalTensor& parameter, const Tensor& x,
      const char* x_name = "x") {
    if (!parameter.has_value()) return;
    check_device(name, *parameter, x, x_name);
    const ScalarType dtype = parameter->scalar_type();
    check(dtype == x.scalar_type() || dtype == ScalarType::Float, name, ": expected ", x_name,
        "'s dtype or float32, got ", torch::headeronly::toString(dtype));
    held_ = as_contiguous(*parameter);
    view_ = {held_->const_data_ptr(), dtype == ScalarType::Float};
  }
  cuda::Parameter view() const { return view_; }

 private:
  OptionalTensor held_;
  cuda::Parameter view_;
};

// A matrix in the dtype of the activations, contiguous; checked as a parameter.
inline Tensor with_dtype_of(
    const Tensor& x, const char* name, const Tensor& matrix, const char* x_name = "x") {
  const Values checked(name, matrix, x, x_name);
  const Tensor contiguous = as_contiguous(matrix);
  if (contiguous.scalar_type() == x.scalar_type()) return contiguous;
  return torch::stable::to(contiguous, x.scalar_type());
}

}  // namespace dsnet
