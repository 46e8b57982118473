// Starts a kernel, on a GPU or in the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/ptx.cuh"

namespace dsnet::cuda {

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared_bytes = 0;
};

// Throws std::runtime_error, naming the kernel, where the launch is refused.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
    const Arguments&... arguments) {
#ifdef DSNET_EMULATE
  emulator::check_stream(name, stream);
  emulator::launch(
      name, grid.blocks, grid.threads, grid.dynamic_shared_bytes, [&] { kernel(arguments...); });
#else
  constexpr size_t shared_bytes_without_opt_in = 48 * 1024;
  cudaError_t status = cudaSuccess;
  if (grid.dynamic_shared_bytes > shared_bytes_without_opt_in) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(grid.dynamic_shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.dynamic_shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("kernel ") + name + ": " + cudaGetErrorString(status));
  }
#endif
}

}  // namespace dsnet::cuda
