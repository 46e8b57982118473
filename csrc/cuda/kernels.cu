// Every CUDA kernel: the one translation unit that nvcc compiles.
#include "cuda/depthwise_conv3x3.cuh"
