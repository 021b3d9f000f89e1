#include "common/cuda_device.h"

#ifndef CA3D_CUDA_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace ca3d {

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace ca3d
