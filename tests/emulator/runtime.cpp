// Python module: the start of kernels on a GPU (csrc/cuda/launch.cuh) and one operation's bindings,
// on a CUDA runtime that records its calls and runs nothing.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <thread>
#include <vector>

#include "cuda/launch.cuh"
#include "device.h"

#define dsnet_kernels dsnet_recorded
#include "bindings/cuda/depthwise_conv3x3.cpp"

namespace py = pybind11;

namespace {

// Guarded by Python's lock.
struct Record {
  std::vector<py::dict> calls;
  cudaError_t attribute_status = cudaSuccess, launch_status = cudaSuccess;
  cudaError_t last_error = cudaSuccess;
};

Record& record() {
  static Record instance;
  return instance;
}

template <typename... Items>
void add(const char* function, Items&&... items) {
  record().calls.push_back(py::dict(py::arg("call") = function,
      py::arg("device") = dsnet::emulator::devices().current, std::forward<Items>(items)...));
}

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Kernels are only named, never run.
void first(int, const void*) {}
void second(int, const void*) {}

constexpr auto kernel_of = [](bool is_second) { return is_second ? second : first; };

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = dsnet::emulator::devices().current;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const py::gil_scoped_acquire python;
  add("attribute", py::arg("kernel") = number(kernel), py::arg("bytes") = value,
      py::arg("is_shared") = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize);
  return record().last_error = record().attribute_status;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  const auto extent = [](dim3 size) { return py::make_tuple(size.x, size.y, size.z); };
  const py::gil_scoped_acquire python;
  add("launch", py::arg("kernel") = number(kernel), py::arg("bytes") = config->dynamicSmemBytes,
      py::arg("stream") = number(config->stream), py::arg("blocks") = extent(config->gridDim),
      py::arg("threads") = extent(config->blockDim), py::arg("attributes") = config->numAttrs,
      py::arg("argument") = *static_cast<int*>(args[0]),
      py::arg("pointer") = number(*static_cast<void**>(args[1])));
  return record().last_error = record().launch_status;
}

cudaError_t cudaGetLastError() { return std::exchange(record().last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "invalid argument" : "no kernel image is available";
}

namespace dsnet::emulator {

void on_current_device(void*) {}

}  // namespace dsnet::emulator

namespace dsnet::cuda {

void depthwise_forward(
    const DepthwiseForward& args, Storage, const DepthwiseLaunch&, CUstream_st* stream) {
  launch("depthwise_forward", first, {{3, 2}, {32, 4}, 64 * 1024}, stream, 7, args.x.data);
}

void depthwise_backward(
    const DepthwiseBackward& args, Storage, const DepthwiseLaunch&, CUstream_st* stream) {
  launch("depthwise_backward", second, {{1}, {32}, 0}, stream, 8, args.partials);
}

}  // namespace dsnet::cuda

PYBIND11_MODULE(emulator_runtime, m) {
  using dsnet::emulator::devices;
  m.def("take_calls", [] { return std::exchange(record().calls, {}); });
  m.def("kernel",
      [](bool is_second) { return number(reinterpret_cast<const void*>(kernel_of(is_second))); });
  m.def("launch", [](bool is_second, size_t bytes, uintptr_t stream) {
    const void* pointer = nullptr;
    dsnet::cuda::launch("some_kernel", kernel_of(is_second), {{5}, {64}, bytes},
        reinterpret_cast<cudaStream_t>(stream), 42, pointer);
  });
  m.def(
      "launch_in_threads",
      [](int count, size_t bytes) {
        std::vector<std::thread> threads;
        for (int i = 0; i < count; ++i) {
          threads.emplace_back([=] {
            const void* pointer = nullptr;
            dsnet::cuda::launch("some_kernel", second, {{5}, {64}, bytes}, nullptr, 42, pointer);
          });
        }
        for (std::thread& thread : threads) thread.join();
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("fail", [](bool attribute, bool launch) {
    record().attribute_status = attribute ? cudaErrorInvalidValue : cudaSuccess;
    record().launch_status = launch ? cudaErrorNoKernelImageForDevice : cudaSuccess;
  });
  m.def("last_error", [] { return static_cast<int>(cudaGetLastError()); });
  m.def("device", [] { return devices().current; });
  m.def("make_current", [](int device) { devices().current = device; });
  m.def("use_stream", [](int device, int stream) {
    devices().stream[device] = stream;
    return number(dsnet::emulator::stream_of(device));
  });
  m.def("fail_stream_query", [](bool fails) { devices().stream_query_fails = fails; });
  m.def("place", [](uintptr_t data, int device) {
    devices().elsewhere[reinterpret_cast<const void*>(data)] = device;
  });
}
