// CUDA kernels of the pre-parameter SGD step: the step, and the question whether it would overflow.
//
// A block takes one chunk of one tensor, which it finds in the table of its argument. Where all
// tensors of the chunk begin at multiples of 16 bytes, threads take 16 bytes of w and g at a time,
// and the last elements one by one. Products and sums are rounded one by one, never fused, so that
// every backend gives the same bits.
#include "common/cuda.h"
#include "common/elements.cuh"
#include "preparam_step/preparam_step_cuda.h"

namespace ca3d {
namespace {

static_assert(sizeof(PreParamArguments<double, kSmallTable>) <= 4096, "limit before CUDA 12.1");
static_assert(sizeof(PreParamArguments<double, kLargeTable>) <= 32764,
              "limit of a kernel argument");

__device__ __forceinline__ float product(float x, float y) {
  return __fmul_rn(x, y);
}
__device__ __forceinline__ double product(double x, double y) {
  return __dmul_rn(x, y);
}
__device__ __forceinline__ float sum(float x, float y) {
  return __fadd_rn(x, y);
}
__device__ __forceinline__ double sum(double x, double y) {
  return __dadd_rn(x, y);
}

// The nearest value that the storage holds, ties to even. Other ways of rounding are other classes:
// `round` is told which element of the tensor it rounds.
struct Nearest {
  template <class Real, class Stored>
  static __device__ __forceinline__ void round(Real x, int64_t /*element*/, Stored* to) {
    narrow(x, to);
  }
};

// The numbers of the step, from the argument or from device memory.
template <class Arguments>
__device__ __forceinline__ auto current_numbers(const Arguments& a) {
  auto x = a.numbers;
  using Real = decltype(x.lr);
  const double* const numbers = a.device.numbers;
  if (numbers) {
    x.lr = static_cast<Real>(numbers[0]);
    x.momentum = static_cast<Real>(numbers[1]);
    x.fresh = static_cast<Real>(1 - numbers[2]);
    x.weight_decay = static_cast<Real>(numbers[3]);
    x.scale = static_cast<Real>(numbers[4]);
    x.gradient_scale = static_cast<Real>(numbers[5]);
  }
  if (a.device.grad_scale) {
    const double scale = numbers ? numbers[5] : a.gradient_scale;
    x.gradient_scale = static_cast<Real>(scale / *a.device.grad_scale);
  }
  return x;
}

// The new values of kWidth elements, as they are stored.
template <class Param, class PreParam, int kWidth>
struct Stepped {
  Param param[kWidth];
  PreParam pre_param[kWidth], momentum[kWidth];
};

// Where a chunk lies. Momentum is null for a step without.
template <class Param, class PreParam>
struct Chunk {
  Param* param;
  const Param* grad;
  PreParam* pre_param;
  PreParam* momentum;
  int64_t first;  // element of the tensor
  int32_t count;

  __device__ bool is_aligned() const {
    const uintptr_t addresses =
        reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
        reinterpret_cast<uintptr_t>(pre_param) | reinterpret_cast<uintptr_t>(momentum);
    return addresses % kVectorBytes == 0;
  }
};

template <class Rounding, class Param, class PreParam, int kTensors>
struct Kernel {
  using Real = Computed<PreParam>;
  using Arguments = PreParamArguments<Real, kTensors>;
  using Part = Chunk<Param, PreParam>;
  static constexpr int kVector = kVectorWidth<Param>;

  static __device__ Part locate(const Arguments& a) {
    // The last tensor whose first block isn't behind this one.
    int low = 0, high = a.tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (a.first_block[middle] <= blockIdx.x) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const PreParamRun& run = a.runs[low];
    const int64_t first = static_cast<int64_t>(blockIdx.x - a.first_block[low]) * kPreParamChunk;
    const int64_t left = run.count - first;
    PreParam* const momentum = static_cast<PreParam*>(run.momentum);
    return {static_cast<Param*>(run.param) + first,
            static_cast<const Param*>(run.grad) + first,
            static_cast<PreParam*>(run.pre_param) + first,
            momentum ? momentum + first : nullptr,
            first,
            static_cast<int32_t>(left < kPreParamChunk ? left : kPreParamChunk)};
  }

  // Computes the elements at .. at + kWidth - 1 of a chunk.
  template <int kWidth>
  static __device__ __forceinline__ Stepped<Param, PreParam, kWidth> step(
      const PreParamNumbers<Real>& x, bool nesterov, const Part& chunk, int32_t at) {
    Param grad[kWidth];
    PreParam pre_param[kWidth], momentum[kWidth] = {};
    read<kWidth>(chunk.grad + at, grad);
    read<kWidth>(chunk.pre_param + at, pre_param);
    if (chunk.momentum) read<kWidth>(chunk.momentum + at, momentum);
    Stepped<Param, PreParam, kWidth> to;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t element = chunk.first + at + i;
      const Real g = widen(grad[i]), theta = widen(pre_param[i]);
      const Real d = sum(product(g, x.gradient_scale), product(theta, x.weight_decay));
      Real update = d;
      to.momentum[i] = momentum[i];
      if (chunk.momentum) {
        const Real m = sum(product(widen(momentum[i]), x.momentum), product(d, x.fresh));
        update = nesterov ? sum(d, product(m, x.momentum)) : m;
        Rounding::round(m, element, &to.momentum[i]);
      }
      Rounding::round(sum(theta, -product(update, x.lr)), element, &to.pre_param[i]);
      narrow(static_cast<Real>(widen(to.pre_param[i])) / x.scale, &to.param[i]);
    }
    return to;
  }

  template <int kWidth>
  static __device__ __forceinline__ void write(const Stepped<Param, PreParam, kWidth>& to,
                                               const Part& chunk, int32_t at) {
    ca3d::write<kWidth>(chunk.param + at, to.param);
    ca3d::write<kWidth>(chunk.pre_param + at, to.pre_param);
    if (chunk.momentum) ca3d::write<kWidth>(chunk.momentum + at, to.momentum);
  }

  template <int kWidth>
  static __device__ __forceinline__ bool is_finite(const Stepped<Param, PreParam, kWidth>& to) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      finite = finite && isfinite(widen(to.param[i])) && isfinite(widen(to.pre_param[i])) &&
               isfinite(widen(to.momentum[i]));
    }
    return finite;
  }

  // Calls `visit` with the stepped elements of this thread, vectors first.
  template <class Visit>
  static __device__ __forceinline__ void each(const Arguments& a, Visit visit) {
    const PreParamNumbers<Real> numbers = current_numbers(a);
    const Part chunk = locate(a);
    const int32_t vectors = chunk.is_aligned() ? chunk.count / kVector : 0;
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < vectors; i += kPreParamThreads) {
      visit(step<kVector>(numbers, a.nesterov, chunk, i * kVector), chunk, i * kVector);
    }
    for (int32_t i = vectors * kVector + threadIdx.x; i < chunk.count; i += kPreParamThreads) {
      visit(step<1>(numbers, a.nesterov, chunk, i), chunk, i);
    }
  }

  static __device__ __forceinline__ void step_all(const Arguments& a) {
    if (a.device.found_inf && *a.device.found_inf != 0) return;
    each(a, [](const auto& to, const Part& chunk, int32_t at) { write(to, chunk, at); });
  }

  static __device__ __forceinline__ void find_overflows(const Arguments& a) {
    bool finite = true;
    each(a, [&](const auto& to, const Part&, int32_t) { finite = finite && is_finite(to); });
    if (!finite) atomicExch(a.device.found_inf, 1.0f);
  }
};

}  // namespace

// ---- entries ----

// Blocks that a multiprocessor holds: leaves a thread 80 registers.
constexpr int kBlocksAtLeast = 3;

// The kernels for one pair of stored types and one size of table, under names that tools can find.
#define CA3D_ENTRY(function, name, Param, PreParam, kTensors)                                   \
  extern "C" __global__ void __launch_bounds__(kPreParamThreads, kBlocksAtLeast)                \
      name(const __grid_constant__ PreParamArguments<Computed<PreParam>, kTensors> arguments) { \
    Kernel<Nearest, Param, PreParam, kTensors>::function(arguments);                            \
  }

#define CA3D_ENTRIES_OF_TABLE(Param, PreParam, types, kTensors, size)                  \
  CA3D_ENTRY(step_all, ca3d_preparam_step_##types##_##size, Param, PreParam, kTensors) \
  CA3D_ENTRY(find_overflows, ca3d_preparam_overflows_##types##_##size, Param, PreParam, kTensors)

// CUDA before 12.1 has no arguments above 4 KB.
#if defined(CA3D_CUDA_EMULATION) || CUDART_VERSION >= 12010
#define CA3D_LARGE_TABLES 1
#define CA3D_ENTRIES(Param, PreParam, types)                        \
  CA3D_ENTRIES_OF_TABLE(Param, PreParam, types, kSmallTable, small) \
  CA3D_ENTRIES_OF_TABLE(Param, PreParam, types, kLargeTable, large)
#define CA3D_LARGE_KERNELS(types) \
  ca3d_preparam_step_##types##_large, ca3d_preparam_overflows_##types##_large
#else
#define CA3D_LARGE_TABLES 0
#define CA3D_ENTRIES(Param, PreParam, types) \
  CA3D_ENTRIES_OF_TABLE(Param, PreParam, types, kSmallTable, small)
#define CA3D_LARGE_KERNELS(types) nullptr, nullptr
#endif

CA3D_ENTRIES(float, float, float32_float32)
CA3D_ENTRIES(double, double, float64_float64)
CA3D_ENTRIES(Half, Half, float16_float16)
CA3D_ENTRIES(Half, float, float16_float32)
CA3D_ENTRIES(BFloat16, BFloat16, bfloat16_bfloat16)
CA3D_ENTRIES(BFloat16, float, bfloat16_float32)

namespace {

// The kernels of one pair of types.
template <class Real>
struct Kernels {
  using Small = void (*)(PreParamArguments<Real, kSmallTable>);
  using Large = void (*)(PreParamArguments<Real, kLargeTable>);

  Small step, overflows;
  Large large_step, large_overflows;

  void run(const PreParamStep& x, const PreParamRun* runs, int64_t count,
           const PreParamDevice& addresses, bool asks_overflows, cudaStream_t stream) const {
    for (const PreParamLaunch& one : plan_preparam(runs, count, CA3D_LARGE_TABLES)) {
      if (one.large) {
        launch(asks_overflows ? large_overflows : large_step, one.grid, kPreParamThreads, 0, stream,
               arguments_of<Real, kLargeTable>(x, one, runs, addresses));
      } else {
        launch(asks_overflows ? overflows : step, one.grid, kPreParamThreads, 0, stream,
               arguments_of<Real, kSmallTable>(x, one, runs, addresses));
      }
      check(cudaGetLastError());
    }
  }
};

#define CA3D_KERNELS(types)                                                     \
  {ca3d_preparam_step_##types##_small, ca3d_preparam_overflows_##types##_small, \
   CA3D_LARGE_KERNELS(types)}

const Kernels<float> kFloat32 = CA3D_KERNELS(float32_float32);
const Kernels<double> kFloat64 = CA3D_KERNELS(float64_float64);
const Kernels<float> kFloat16[2] = {CA3D_KERNELS(float16_float16), CA3D_KERNELS(float16_float32)};
const Kernels<float> kBFloat16[2] = {CA3D_KERNELS(bfloat16_bfloat16),
                                     CA3D_KERNELS(bfloat16_float32)};

void run(const PreParamStep& step, const PreParamRun* runs, int64_t count,
         const PreParamDevice& addresses, bool overflows, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const std::vector<PreParamRun> kept = nonempty(runs, count);
  const int64_t tensors = static_cast<int64_t>(kept.size());
  const bool mixed = step.pre_param != step.param;
  switch (step.param) {
    case DType::kFloat64:
      return kFloat64.run(step, kept.data(), tensors, addresses, overflows, queue);
    case DType::kFloat32:
      return kFloat32.run(step, kept.data(), tensors, addresses, overflows, queue);
    case DType::kFloat16:
      return kFloat16[mixed].run(step, kept.data(), tensors, addresses, overflows, queue);
    case DType::kBFloat16:
      return kBFloat16[mixed].run(step, kept.data(), tensors, addresses, overflows, queue);
  }
}

}  // namespace

void run_preparam_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       const PreParamDevice& addresses, int device, void* stream) {
  run(step, runs, count, addresses, false, device, stream);
}

void run_preparam_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                            const PreParamDevice& addresses, int device, void* stream) {
  run(step, runs, count, addresses, true, device, stream);
}

}  // namespace ca3d
