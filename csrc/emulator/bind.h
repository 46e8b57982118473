// What every test module of the emulator shows to Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "emulator/block.h"

namespace dsnet::emulator {

namespace py = pybind11;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A Buffer with the bytes of an array. Where `present` is given, one flag per byte, the others
// stay unwritten.
inline std::unique_ptr<Buffer> make_buffer(
    const std::string& name, const py::array& array, bool writable, const py::object& present) {
  const auto contiguous = py::array::ensure(array, py::array::c_style);
  const auto bytes = static_cast<size_t>(contiguous.nbytes());
  auto buffer = std::make_unique<Buffer>(name, bytes, writable);
  const auto* source = static_cast<const std::byte*>(contiguous.data());
  if (present.is_none()) {
    buffer->write(0, source, bytes);
    return buffer;
  }
  const auto flags = py::cast<py::array_t<bool, py::array::c_style>>(present);
  if (static_cast<size_t>(flags.size()) != bytes) {
    throw py::value_error("present: expected " + std::to_string(bytes) + " flags, got " +
                          std::to_string(flags.size()));
  }
  for (size_t i = 0; i < bytes; ++i) {
    if (flags.data()[i]) buffer->write(i, source + i, 1);
  }
  return buffer;
}

inline void bind(py::module_& m) {
  py::register_local_exception<Error>(m, "Error", PyExc_RuntimeError);
  m.def("set_seed", &set_seed, py::arg("seed"));

  py::class_<Buffer>(m, "Buffer", py::module_local())
      .def(py::init([](const std::string& name, size_t bytes) {
        return std::make_unique<Buffer>(name, bytes, true);
      }),
          py::arg("name"), py::arg("bytes"), "Writable and unwritten.")
      .def(py::init(&make_buffer), py::arg("name"), py::arg("array"), py::kw_only(),
          py::arg("writable") = false, py::arg("present") = py::none(),
          "A copy of the array's bytes; of those without a flag in `present`, none.")
      .def_property_readonly(
          "address", [](const Buffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_property_readonly(
          "bytes",
          [](const Buffer& b) {
            return py::array_t<uint8_t>(
                static_cast<py::ssize_t>(b.size()), reinterpret_cast<const uint8_t*>(b.data()));
          },
          "A copy of the content.")
      .def_property_readonly(
          "memory",
          [](const py::object& self) {
            const auto& b = py::cast<const Buffer&>(self);
            return py::array_t<uint8_t>(static_cast<py::ssize_t>(b.size()),
                reinterpret_cast<const uint8_t*>(b.data()), self);
          },
          "The content itself; the array keeps the buffer alive.")
      .def_property_readonly("name", &Buffer::name)
      .def_property("writable", &Buffer::writable, &Buffer::set_writable)
      .def_property_readonly("written",
          [](const Buffer& b) {
            py::array_t<bool> flags(static_cast<py::ssize_t>(b.size()));
            for (size_t i = 0; i < b.size(); ++i)
              flags.mutable_data()[i] = b.writer(i) != Buffer::nobody;
            return flags;
          })
      .def(
          "mark_written",
          [](Buffer& b, size_t offset, const py::array_t<bool, py::array::c_style>& flags) {
            const auto count = static_cast<size_t>(flags.size());
            if (offset + count > b.size()) throw py::index_error(b.name() + " is shorter");
            for (size_t i = 0; i < count; ++i) {
              if (flags.data()[i]) b.set_writer(offset + i, Buffer::host);
            }
          },
          py::arg("offset"), py::arg("flags"),
          "The host gave the flagged bytes from `offset` on a value.")
      .def_static(
          "find",
          [](uintptr_t address) { return Buffer::find(reinterpret_cast<const void*>(address)); },
          py::arg("address"), py::return_value_policy::reference,
          "The buffer that holds an address, or None.");
}

}  // namespace dsnet::emulator
