// What the CUDA runtime says about itself and the driver.
#pragma once

namespace ca3d {

// 13000 for 13.0: what the library was built with.
int cuda_runtime_version();

// The newest CUDA version that the driver supports, 0 without a driver.
int cuda_driver_version();

}  // namespace ca3d
