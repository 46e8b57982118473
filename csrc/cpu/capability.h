// Instruction sets that kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

// dsnet_kernels._C calls these across the library's border.
#define DSNET_EXPORT __attribute__((visibility("default")))

namespace dsnet::cpu {

enum class Capability { generic, avx2, avx512, avx512_bf16 };

// Name as DSNET_CPU_CAPABILITY and the Python side spell it.
DSNET_EXPORT const char* name(Capability capability);

// Every capability that this library was compiled for and this CPU has, ascending.
DSNET_EXPORT std::vector<Capability> capabilities();

// The one in use: DSNET_CPU_CAPABILITY if set, else the highest.
// Throws std::invalid_argument for a name that is unknown or not available here.
DSNET_EXPORT Capability capability();

// Replaces the one in use, for tests and comparisons.
DSNET_EXPORT void set_capability(const std::string& name);

}  // namespace dsnet::cpu
