// Everything that nvcc compiles: each header defines the kernels and launchers of one operation.
#include "cuda/depthwise_conv3x3.cuh"
#include "cuda/global_attention.cuh"
#include "cuda/global_attention_backward.cuh"
