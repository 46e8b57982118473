// What some bindings on NVIDIA GPUs share: checks, dense products.
#pragma once

#include <array>

#include "bindings/cuda/launch.h"

namespace dsnet {

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype),
      ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

// out = a·b in out's dtype: a and b's, or float32. Variants with `out` are no concern of autocast,
// which would change the dtype; they take no tensors that require a gradient.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  const auto detached = [](const Tensor& x) {
    std::array<StableIValue, 1> stack{from(x)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
    return stack[0];
  };
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{detached(a), detached(b), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    return;
  }
  std::array<StableIValue, 4> stack{detached(a), detached(b), from(out.scalar_type()), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dsnet
