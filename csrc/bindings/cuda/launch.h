// What the bindings of every operator on NVIDIA GPUs share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "bindings/arguments.h"
#include "cuda/storage.h"

struct CUstream_st;

namespace dsnet {

inline cuda::Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cuda::Storage::float32;
    case ScalarType::BFloat16: return cuda::Storage::bfloat16;
    case ScalarType::Half: return cuda::Storage::float16;
    default:
      throw std::runtime_error(std::string("x: expected float32, bfloat16 or float16, got ") +
                               torch::headeronly::toString(x.scalar_type()));
  }
}

// The device of a call made current, and torch's stream on it: kernels are launched with both.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
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
  Values(const char* name, const OptionalTensor& parameter, const Tensor& x) {
    if (!parameter.has_value()) return;
    check(parameter->get_device_index() == x.get_device_index() && parameter->is_cuda(), name,
        ": expected x's device");
    const ScalarType dtype = parameter->scalar_type();
    check(dtype == x.scalar_type() || dtype == ScalarType::Float, name,
        ": expected x's dtype or float32, got ", torch::headeronly::toString(dtype));
    held_ = as_contiguous(*parameter);
    view_ = {held_->const_data_ptr(), dtype == ScalarType::Float};
  }
  cuda::Parameter view() const { return view_; }

 private:
  OptionalTensor held_;
  cuda::Parameter view_;
};

}  // namespace dsnet
