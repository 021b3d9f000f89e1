// Functions that the CPU and the GPU share.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define CA3D_HOST_DEVICE __host__ __device__
#else
#define CA3D_HOST_DEVICE
#endif
