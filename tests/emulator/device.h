// The GPUs that device.cpp makes up.
#pragma once

#include <map>

namespace dsnet::emulator {

struct Devices {
  static constexpr int count = 2, streams_of_each = 2;
  int current = 0;
  // The device that tensors are on, but for those with their data at an address named here.
  int of_tensors = 1;
  std::map<const void*, int> elsewhere;
  // torch's current stream on each device.
  int stream[count] = {0, 0};
  bool stream_query_fails = false;
};

Devices& devices();
// The handle of torch's current stream on a device.
void* stream_of(int device);
// Called with the current stream of the device that becomes current; each module defines it.
void on_current_device(void* stream);

}  // namespace dsnet::emulator
