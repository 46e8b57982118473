// The CUDA versions that Python compares before the first launch.
#include <cuda_runtime_api.h>

// The newest CUDA that the driver serves and the runtime inside this library, such as 12080 and
// 13000; the driver is 0 where there is none. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int dsnet_kernels_cuda_versions(
    int* driver, int* runtime) {
  const cudaError_t error = cudaDriverGetVersion(driver);
  return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}
