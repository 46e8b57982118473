// What the test modules of CUDA launchers bind alike.
#pragma once

#include "cuda/storage.h"
#include "emulator/bind.h"

namespace dsnet::emulator {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The emulator itself, and the types of arguments that all launchers share.
inline void bind_arguments(py::module_& m) {
  using cuda::Parameter, cuda::Storage;
  bind(m);
  py::enum_<Storage>(m, "Storage", py::module_local())
      .value("float32", Storage::float32)
      .value("bfloat16", Storage::bfloat16)
      .value("float16", Storage::float16);
  py::class_<Parameter>(m, "Parameter", py::module_local())
      .def(py::init(
          [](uintptr_t data, bool is_float32) { return Parameter{at<void>(data), is_float32}; }));
}

}  // namespace dsnet::emulator
