// Argument checks of native entries: each error names the argument, expected and got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dsnet {

// Throws what Python sees as RuntimeError, with the parts as its whole message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << ')';
  return text.str();
}

inline void check_shape(const char* name, const torch::stable::Tensor& tensor,
    std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t d = 0;
  for (int64_t size : expected) same = same && tensor.size(d++) == size;
  check(
      same, name, ": expected shape ", shape_text(expected), ", got ", shape_text(tensor.sizes()));
}

inline void check_shape(const char* name, const std::optional<torch::stable::Tensor>& tensor,
    std::initializer_list<int64_t> expected) {
  if (tensor.has_value()) check_shape(name, *tensor, expected);
}

}  // namespace dsnet
