// How activations are stored.
#pragma once

namespace dsnet::cpu {

enum class Storage { float32, bfloat16, float64 };

}  // namespace dsnet::cpu
