// What the module of every operation shares: real launchers in the emulator, called by the real
// bindings, with launch configurations that Python can read and change.
#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/storage.h"
#include "device.h"
#include "emulator/bind.h"

// The operators' kernels are registered next to the real ones.
#define dsnet_kernels dsnet_emulated

namespace dsnet::emulator {

using Fields = std::map<std::string, int64_t>;

inline Fields& replaced_fields() {
  static Fields fields;
  return fields;
}

// Each module has one source file that includes this header.
void on_current_device(void* stream) { expect_stream(stream); }

// An object whose attributes are the fields of a launch configuration, as `visit_fields` names
// them.
template <typename Launch>
py::object as_object(Launch launch) {
  py::dict fields;
  visit_fields(launch, [&](const char* name, const auto& field) { fields[name] = field; });
  fields["text"] = text(launch);
  return py::module_::import("types").attr("SimpleNamespace")(**fields);
}

// Binds the emulator, and how tests change the next calls.
inline void bind_operation(py::module_& m) {
  bind(m);
  py::enum_<cuda::Storage>(m, "Storage", py::module_local())
      .value("float32", cuda::Storage::float32)
      .value("bfloat16", cuda::Storage::bfloat16)
      .value("float16", cuda::Storage::float16);
  m.def("replace_fields", [](const Fields& fields) { replaced_fields() = fields; });
}

}  // namespace dsnet::emulator

namespace dsnet::cuda {

// The configuration with the fields that a test replaces. Bindings call it by the macro below.
template <typename Launch>
Launch with_replaced_fields(Launch launch) {
  emulator::Fields unknown = emulator::replaced_fields();
  visit_fields(launch, [&](const char* name, auto& field) {
    const auto found = unknown.find(name);
    if (found == unknown.end()) return;
    field = static_cast<std::decay_t<decltype(field)>>(found->second);
    unknown.erase(found);
  });
  if (unknown.empty()) return launch;
  throw std::invalid_argument("fields: the launch has no " + unknown.begin()->first);
}

}  // namespace dsnet::cuda
