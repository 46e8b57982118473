// dsnet_kernels._C: what is not a tensor operation, for people and tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_record.h"
#include "cpu/capability.h"

namespace py = pybind11;
namespace cpu = dsnet::cpu;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the native libraries.";

  m.def(
      "cpu_capability", [] { return cpu::name(cpu::capability()); },
      "The instruction set in use: 'generic', 'avx2' or 'avx512'.");
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"),
      "Replaces the instruction set in use. ValueError if it is unknown or not on this CPU.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (cpu::Capability capability : cpu::capabilities())
          names.push_back(cpu::name(capability));
        return names;
      },
      "The instruction sets compiled in and on this CPU, ascending.");
  m.def(
      "build_configuration", [] { return py::module_::import("json").attr("loads")(build_record); },
      "What this module was built with: the record that is also in build.json.");
}
