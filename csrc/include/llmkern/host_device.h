// For functions that kernels call too.
#pragma once

#ifdef __CUDACC__
#define LLMKERN_HOST_DEVICE __host__ __device__
#else
#define LLMKERN_HOST_DEVICE
#endif
