// CUDA kernels of the pre-parameter SGD step: the step, and the question whether it would overflow.
//
// A block takes one chunk of one tensor, which it finds in the table of its argument. Where all
// tensors of the chunk begin at multiples of 16 bytes, threads take 16 bytes of theta at a time,
// and as many elements of w and g (8 bytes where these are narrower), and the last elements one by
// one. Products and sums are rounded one by one, never fused, so that every backend gives the same
// bits.
#include "common/cuda.h"
#include "common/elements.cuh"
#include "common/philox.cuh"
#include "common/stochastic.cuh"
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

// ---- ways of rounding theta and momentum ----
//
// `draw` makes a random word for each of kWidth elements, of which theta takes the low half and the
// momentum the high one; `round` stores a value.

struct Nearest {
  static constexpr bool kCompensates = false;

  template <int kWidth, class Arguments, class Part>
  static __device__ __forceinline__ void draw(const Arguments&, const Part&, int32_t, uint32_t*) {}
  template <class Real, class Stored>
  static __device__ __forceinline__ void round(Real x, uint32_t /*random*/, Stored* to) {
    narrow(x, to);
  }
};

struct Compensated : Nearest {
  static constexpr bool kCompensates = true;
};

struct Stochastic {
  static constexpr bool kCompensates = false;

  template <int kWidth, class Arguments, class Part>
  static __device__ __forceinline__ void draw(const Arguments& a, const Part& chunk, int32_t at,
                                              uint32_t* random) {
    ca3d::draw<kWidth>(a.seed, chunk.first + at, chunk.number, a.steps, random);
  }
  template <class Stored>
  static __device__ __forceinline__ void round(float x, uint32_t random, Stored* to) {
    narrow_stochastically(x, random, to);
  }
};

// Rounds away from zero, and so bounds what any draw stores.
struct LargestDraw : Stochastic {
  template <int kWidth, class Arguments, class Part>
  static __device__ __forceinline__ void draw(const Arguments&, const Part&, int32_t,
                                              uint32_t* random) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) random[i] = 0xffffffff;
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
    x.fresh = static_cast<Real>(numbers[2]);
    x.weight_decay = static_cast<Real>(numbers[3]);
    x.scale = static_cast<Real>(numbers[4]);
    x.gradient_scale = static_cast<Real>(numbers[5]);
  }
  return x;
}

// The new values of kWidth elements, as they are stored.
template <class Param, class PreParam, int kWidth>
struct Stepped {
  Param param[kWidth];
  PreParam pre_param[kWidth], momentum[kWidth], compensation[kWidth];
};

// Where a chunk lies. Momentum is null for a step without, and so is compensation.
template <class Param, class PreParam>
struct Chunk {
  Param* param;
  const Param* grad;
  PreParam* pre_param;
  PreParam* momentum;
  PreParam* compensation;
  int64_t first;    // element of the tensor
  uint32_t number;  // of the tensor
  int32_t count;

  __device__ bool is_aligned() const {
    const uintptr_t addresses =
        reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
        reinterpret_cast<uintptr_t>(pre_param) | reinterpret_cast<uintptr_t>(momentum) |
        reinterpret_cast<uintptr_t>(compensation);
    return addresses % kVectorBytes == 0;
  }
};

template <class Rounding, class Param, class PreParam, int kTensors>
struct Kernel {
  using Real = Computed<PreParam>;
  using Arguments = PreParamArguments<Real, kTensors>;
  using Part = Chunk<Param, PreParam>;
  // 16 bytes of theta; w and g may be narrower. Neighbouring threads take neighbouring vectors, so
  // that every sector moves once.
  static constexpr int kVector = kVectorWidth<PreParam>;
  static constexpr bool kCompensates = Rounding::kCompensates;

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
    PreParam* const compensation = static_cast<PreParam*>(run.compensation);
    return {static_cast<Param*>(run.param) + first,
            static_cast<const Param*>(run.grad) + first,
            static_cast<PreParam*>(run.pre_param) + first,
            momentum ? momentum + first : nullptr,
            kCompensates ? compensation + first : nullptr,
            first,
            run.number,
            static_cast<int32_t>(left < kPreParamChunk ? left : kPreParamChunk)};
  }

  // Computes the elements at .. at + kWidth - 1 of a chunk.
  template <int kWidth>
  static __device__ __forceinline__ Stepped<Param, PreParam, kWidth> step(
      const Arguments& a, const PreParamNumbers<Real>& x, const Part& chunk, int32_t at) {
    Param grad[kWidth];
    PreParam pre_param[kWidth], momentum[kWidth] = {}, rest[kWidth] = {};
    read<kWidth>(chunk.grad + at, grad);
    read<kWidth>(chunk.pre_param + at, pre_param);
    if (chunk.momentum) read<kWidth>(chunk.momentum + at, momentum);
    if (kCompensates) read<kWidth>(chunk.compensation + at, rest);
    uint32_t random[kWidth] = {};
    Rounding::template draw<kWidth>(a, chunk, at, random);
    Stepped<Param, PreParam, kWidth> to;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real g = widen(grad[i]), theta = widen(pre_param[i]), lacking = widen(rest[i]);
      const Real total = kCompensates ? sum(theta, lacking) : theta;
      const Real d = sum(product(g, x.gradient_scale), product(total, x.weight_decay));
      Real update = d;
      to.momentum[i] = momentum[i];
      to.compensation[i] = rest[i];
      if (chunk.momentum) {
        const Real m = sum(product(widen(momentum[i]), x.momentum), product(d, x.fresh));
        update = a.nesterov ? sum(d, product(m, x.momentum)) : m;
        Rounding::round(m, random[i] >> 16, &to.momentum[i]);
      }
      if (kCompensates) {
        const Real change = sum(lacking, -product(update, x.lr));
        narrow(sum(theta, change), &to.pre_param[i]);
        const Real moved = sum(static_cast<Real>(widen(to.pre_param[i])), -theta);
        narrow(sum(change, -moved), &to.compensation[i]);
      } else {
        const Real stepped = sum(theta, -product(update, x.lr));
        Rounding::round(stepped, random[i] & 0xffff, &to.pre_param[i]);
      }
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
    if (kCompensates) ca3d::write<kWidth>(chunk.compensation + at, to.compensation);
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
      visit(step<kVector>(a, numbers, chunk, i * kVector), chunk, i * kVector);
    }
    for (int32_t i = vectors * kVector + threadIdx.x; i < chunk.count; i += kPreParamThreads) {
      visit(step<1>(a, numbers, chunk, i), chunk, i);
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

// A kernel for one pair of stored types and one size of table, under a name that tools can find.
#define CA3D_ENTRY(Rounding, function, name, Param, PreParam, kTensors)                         \
  extern "C" __global__ void __launch_bounds__(kPreParamThreads, kBlocksAtLeast)                \
      name(const __grid_constant__ PreParamArguments<Computed<PreParam>, kTensors> arguments) { \
    Kernel<Rounding, Param, PreParam, kTensors>::function(arguments);                           \
  }

// The step with a way of rounding, and the search for what would overflow, which bounds it.
#define CA3D_ENTRIES_OF_TABLE(Rounding, Bound, Param, PreParam, suffix, kTensors, size)           \
  CA3D_ENTRY(Rounding, step_all, ca3d_preparam_step_##suffix##_##size, Param, PreParam, kTensors) \
  CA3D_ENTRY(Bound, find_overflows, ca3d_preparam_overflows_##suffix##_##size, Param, PreParam,   \
             kTensors)

// CUDA before 12.1 has no arguments above 4 KB.
#if defined(CA3D_CUDA_EMULATION) || CUDART_VERSION >= 12010
#define CA3D_LARGE_TABLES 1
#define CA3D_ENTRIES(Rounding, Bound, Param, PreParam, suffix)                        \
  CA3D_ENTRIES_OF_TABLE(Rounding, Bound, Param, PreParam, suffix, kSmallTable, small) \
  CA3D_ENTRIES_OF_TABLE(Rounding, Bound, Param, PreParam, suffix, kLargeTable, large)
#define CA3D_LARGE_KERNELS(suffix) \
  ca3d_preparam_step_##suffix##_large, ca3d_preparam_overflows_##suffix##_large
#else
#define CA3D_LARGE_TABLES 0
#define CA3D_ENTRIES(Rounding, Bound, Param, PreParam, suffix) \
  CA3D_ENTRIES_OF_TABLE(Rounding, Bound, Param, PreParam, suffix, kSmallTable, small)
#define CA3D_LARGE_KERNELS(suffix) nullptr, nullptr
#endif

CA3D_ENTRIES(Nearest, Nearest, float, float, float32_float32)
CA3D_ENTRIES(Nearest, Nearest, double, double, float64_float64)
CA3D_ENTRIES(Nearest, Nearest, Half, Half, float16_float16)
CA3D_ENTRIES(Nearest, Nearest, Half, float, float16_float32)
CA3D_ENTRIES(Nearest, Nearest, BFloat16, BFloat16, bfloat16_bfloat16)
CA3D_ENTRIES(Nearest, Nearest, BFloat16, float, bfloat16_float32)
CA3D_ENTRIES(Stochastic, LargestDraw, Half, Half, float16_float16_stochastic)
CA3D_ENTRIES(Stochastic, LargestDraw, BFloat16, BFloat16, bfloat16_bfloat16_stochastic)
CA3D_ENTRIES(Compensated, Compensated, Half, Half, float16_float16_compensated)
CA3D_ENTRIES(Compensated, Compensated, BFloat16, BFloat16, bfloat16_bfloat16_compensated)

namespace {

// The kernels of one pair of types and one way of rounding.
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

#define CA3D_KERNELS(suffix)                                                      \
  {ca3d_preparam_step_##suffix##_small, ca3d_preparam_overflows_##suffix##_small, \
   CA3D_LARGE_KERNELS(suffix)}

const Kernels<float> kFloat32 = CA3D_KERNELS(float32_float32);
const Kernels<double> kFloat64 = CA3D_KERNELS(float64_float64);
const Kernels<float> kFloat16Mixed = CA3D_KERNELS(float16_float32);
const Kernels<float> kBFloat16Mixed = CA3D_KERNELS(bfloat16_float32);
// By Rounding.
const Kernels<float> kFloat16[] = {CA3D_KERNELS(float16_float16),
                                   CA3D_KERNELS(float16_float16_stochastic),
                                   CA3D_KERNELS(float16_float16_compensated)};
const Kernels<float> kBFloat16[] = {CA3D_KERNELS(bfloat16_bfloat16),
                                    CA3D_KERNELS(bfloat16_bfloat16_stochastic),
                                    CA3D_KERNELS(bfloat16_bfloat16_compensated)};

const Kernels<float>& kernels_of(const PreParamStep& step) {
  const bool mixed = step.pre_param != step.param;
  const auto rounding = static_cast<size_t>(step.rounding);
  switch (step.param) {
    case DType::kFloat16:
      return mixed ? kFloat16Mixed : kFloat16[rounding];
    case DType::kBFloat16:
      return mixed ? kBFloat16Mixed : kBFloat16[rounding];
    default:
      return kFloat32;
  }
}

void run(const PreParamStep& step, const PreParamRun* runs, int64_t count,
         const PreParamDevice& addresses, bool overflows, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const std::vector<PreParamRun> kept = nonempty(runs, count);
  const int64_t tensors = static_cast<int64_t>(kept.size());
  if (step.param == DType::kFloat64) {
    kFloat64.run(step, kept.data(), tensors, addresses, overflows, queue);
  } else {
    kernels_of(step).run(step, kept.data(), tensors, addresses, overflows, queue);
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
