// What CUDA sources need from the CUDA runtime. The tests compile the same sources for the host:
// their emulation.h comes first then and defines CA3D_CUDA_EMULATION and everything below.
#pragma once

#ifndef CA3D_CUDA_EMULATION

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

// Names the dynamic shared memory of the block, aligned to 16 bytes.
#define CA3D_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace ca3d {

__device__ __forceinline__ float widen(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

// Round to nearest, ties to even.
__device__ __forceinline__ Half to_half(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
__device__ __forceinline__ BFloat16 to_bfloat16(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Queues a kernel of one argument.
template <class Argument>
cudaError_t launch(void (*kernel)(Argument), unsigned grid, unsigned block, size_t shared,
                   cudaStream_t stream, Argument argument) {
  void* arguments[] = {&argument};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(block), arguments,
                          shared, stream);
}

}  // namespace ca3d

#endif  // CA3D_CUDA_EMULATION

#include <stdexcept>
#include <string>

namespace ca3d {

// The mask of shuffles and votes that all lanes take.
constexpr unsigned kWholeWarp = 0xffffffffu;

// An error of the CUDA runtime, such as 35: no driver, or one older than this library.
class CudaError : public std::runtime_error {
 public:
  explicit CudaError(cudaError_t code)
      : std::runtime_error("CUDA error " + std::to_string(static_cast<int>(code)) + ": " +
                           cudaGetErrorString(code)) {}
};

inline void check(cudaError_t code) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // which would tell it once more, to whoever asks next
  throw CudaError(code);
}

// Makes a device current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace ca3d
