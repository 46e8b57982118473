// Everything that nvcc compiles: headers that define kernels and launchers.
#include "cuda/co_attention_backward.cuh"
#include "cuda/depthwise_conv3x3.cuh"
#include "cuda/global_attention.cuh"
#include "cuda/global_attention_backward.cuh"
#include "cuda/pointwise_mlp_backward_fused.cuh"
#include "cuda/sum_slots.cuh"
#include "cuda/upsample_concat.cuh"
#include "cuda/upsample_concat_backward.cuh"
