// The CUDA versions that Python compares before the first launch.

// Two functions of the CUDA runtime, declared here because the bindings do not include its headers.
// Each returns a cudaError_t.
extern "C" int cudaDriverGetVersion(int* version);
extern "C" int cudaRuntimeGetVersion(int* version);

// The newest CUDA that the driver serves and the runtime inside this library, such as 12080 and
// 13000; the driver is 0 where there is none. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int dsnet_kernels_cuda_versions(
    int* driver, int* runtime) {
  const int error = cudaDriverGetVersion(driver);
  return error != 0 ? error : cudaRuntimeGetVersion(runtime);
}
