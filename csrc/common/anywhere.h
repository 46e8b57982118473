// Functions for CPU and GPU.
#pragma once

#ifdef __CUDACC__
#define DSNET_ANYWHERE __host__ __device__ inline
#else
#define DSNET_ANYWHERE inline
#endif
