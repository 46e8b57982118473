// Starts a kernel, on a GPU or in the emulator. For any C++ compiler, so that tests can run it
// without a GPU.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef DSNET_EMULATE
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace dsnet::cuda {

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared_bytes = 0;
};

#ifndef DSNET_EMULATE
namespace detail {

// Lets a kernel use so much dynamic shared memory on the current device. A limit is only ever
// raised, so that threads with launches of different sizes do not lower each other's, and the
// runtime, which takes a microsecond, is asked no more often than needed.
inline cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes) {
  constexpr size_t allowed_from_the_start = 48 * 1024;
  if (bytes <= allowed_from_the_start) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> limits;  // by kernel and device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& limit = limits[{kernel, device}];
  if (bytes <= limit) return cudaSuccess;
  status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) limit = bytes;
  return status;
}

}  // namespace detail
#endif

// Throws std::runtime_error, naming the kernel, where the launch is refused.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
    const Arguments&... arguments) {
#ifdef DSNET_EMULATE
  emulator::check_stream(name, stream);
  emulator::launch(
      name, grid.blocks, grid.threads, grid.dynamic_shared_bytes, [&] { kernel(arguments...); });
#else
  cudaError_t status = detail::allow_dynamic_shared(
      reinterpret_cast<const void*>(kernel), grid.dynamic_shared_bytes);
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.dynamic_shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (status != cudaSuccess) {
    // The runtime would report the error once more, to the next kernel of torch.
    cudaGetLastError();
    throw std::runtime_error(std::string("kernel ") + name + ": " + cudaGetErrorString(status));
  }
#endif
}

}  // namespace dsnet::cuda
