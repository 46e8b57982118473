// What the bindings of attention on NVIDIA GPUs share: checks, allocation, dense products.
#pragma once

#include <array>
#include <vector>

#include "bindings/cuda/launch.h"

namespace dsnet {

inline void check_device(
    const char* name, const Tensor& tensor, const Tensor& leader, const char* leader_name = "x") {
  check(tensor.is_cuda() && tensor.get_device_index() == leader.get_device_index(), name,
      ": expected ", leader_name, "'s device");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype),
      ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline Tensor empty_like_device(
    const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, x.device());
}

// out = a·b in out's dtype: a and b's, or float32. Variants with `out` are no concern of autocast,
// which would change the dtype; they take no tensors that require a gradient.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 1> detached{from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", detached.data(), TORCH_ABI_VERSION));
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), detached[0], from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    return;
  }
  std::array<StableIValue, 4> stack{from(a), detached[0], from(out.scalar_type()), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dsnet
