// What the test modules of CUDA launchers bind alike.
#pragma once

#include <type_traits>

#include "cuda/storage.h"
#include "emulator/bind.h"

struct CUstream_st;

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

// Binds a launcher, which has no stream here.
template <typename Args, typename Launch>
void bind_launcher(py::module_& m, const char* name,
    void (*launcher)(const Args&, cuda::Storage, const Launch&, CUstream_st*)) {
  m.def(name, [launcher](const Args& args, cuda::Storage storage, const Launch& launch) {
    launcher(args, storage, launch, nullptr);
  });
}

// The write-only property of an address among the arguments.
template <auto member, typename Args>
void bind_address(py::class_<Args>& arguments, const char* name) {
  arguments.def_property(name, nullptr, [](Args& args, uintptr_t address) {
    using Pointer = std::remove_reference_t<decltype(args.*member)>;
    args.*member = at<std::remove_pointer_t<Pointer>>(address);
  });
}

}  // namespace dsnet::emulator
