#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dsnet::cpu {

const char* name(Capability capability) {
  switch (capability) {
    case Capability::generic: return "generic";
    case Capability::avx2: return "avx2";
    case Capability::avx512: return "avx512";
    case Capability::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Capability> capabilities() {
  std::vector<Capability> found{Capability::generic};
#ifdef DSNET_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(Capability::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Capability::avx512);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(Capability::avx512_bf16);
    }
  }
#endif
  return found;
}

namespace {

Capability parse(const std::string& wanted, const char* source) {
  std::string known;
  for (Capability candidate : capabilities()) {
    if (wanted == name(candidate)) return candidate;
    known += known.empty() ? "" : ", ";
    known += name(candidate);
  }
  throw std::invalid_argument(
      std::string(source) + ": expected one of " + known + " on this CPU, got '" + wanted + "'");
}

Capability initial() {
  const char* wanted = std::getenv("DSNET_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return capabilities().back();
  return parse(wanted, "DSNET_CPU_CAPABILITY");
}

std::atomic<Capability>& in_use() {
  static std::atomic<Capability> value{initial()};
  return value;
}

}  // namespace

Capability capability() { return in_use().load(std::memory_order_relaxed); }

void set_capability(const std::string& wanted) { in_use().store(parse(wanted, "cpu_capability")); }

}  // namespace dsnet::cpu
