// GPUs for the bindings where there are none: tensors in CPU memory say that they are on device 1,
// device 0 is current, and each device has streams of its own. The linker's --wrap puts these
// functions in the place of torch's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "device.h"

namespace dsnet::emulator {
namespace {

void make_current(int device) {
  devices().current = device;
  on_current_device(stream_of(device));
}

}  // namespace

Devices& devices() {
  static Devices all;
  return all;
}

void* stream_of(int device) {
  static char handles[Devices::count][Devices::streams_of_each];
  return &handles[device][devices().stream[device]];
}

}  // namespace dsnet::emulator

using namespace dsnet::emulator;

extern "C" {

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  const AOTITorchError status = aoti_torch_get_data_ptr(tensor, &data);
  const auto found = devices().elsewhere.find(data);
  *index = found == devices().elsewhere.end() ? devices().of_tensors : found->second;
  return status;
}

AOTITorchError __real_aoti_torch_create_tensor_from_blob_v2(void*, int64_t, const int64_t*,
    const int64_t*, int64_t, int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t, const uint8_t*,
    int64_t);

AOTITorchError __wrap_aoti_torch_create_tensor_from_blob_v2(void* data, int64_t rank,
    const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t, int32_t,
    AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata, int64_t metadata_size) {
  return __real_aoti_torch_create_tensor_from_blob_v2(data, rank, sizes, strides, offset, dtype,
      aoti_torch_device_type_cpu(), 0, tensor, layout, metadata, metadata_size);
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(devices().current));
  make_current(device);
  return 0;
}

AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  auto* previous = reinterpret_cast<int*>(guard);
  make_current(*previous);
  delete previous;
  return 0;
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = stream_of(device);
  return devices().stream_query_fails ? 1 : 0;
}
}
