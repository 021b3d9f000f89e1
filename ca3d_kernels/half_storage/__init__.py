"""float16 on a CPU: stored in half, computed in float32.

Few CPUs compute in half precision, and torch's float16 convolutions and matrix products are many
times slower than its float32 ones there. Here such functions run in float32 on copies that live no
longer than the call: the graph keeps half tensors, and results are rounded to half once.
"""

from ca3d_kernels.half_storage.convolution import convolution_gradients, convolve
from ca3d_kernels.half_storage.recomputed import applies
from ca3d_kernels.half_storage.table import HalfStorage, half_storage

__all__ = ["HalfStorage", "applies", "convolution_gradients", "convolve", "half_storage"]
