// CUDA kernels of the pre-parameter SGD step: the step, and the question whether it would overflow.
//
// A block takes one chunk of one tensor, which it finds in the table of its argument. Where all
// tensors of the chunk begin at multiples of 16 bytes, threads take 16 bytes of theta at a time,
// and as many elements of w and g (8 bytes where these are narrower), and the last elements one by
// one. Products and sums are rounded one by one, never fused, so that every backend gives the same
// bits.
//
// A step may leave the largest magnitudes that it stored of each chunk. The next search then reads
// only the gradients of a chunk from which nothing so large can overflow.
#include <limits>

#include "common/cuda.h"
#include "common/cuda_device.h"
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

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// The largest finite number of a stored type.
template <class Stored>
constexpr Stored kLargestFinite = std::numeric_limits<Stored>::max();
template <>
constexpr float kLargestFinite<Half> = 65504;
template <>
constexpr float kLargestFinite<BFloat16> = 0x1.fep127f;

template <class Real>
__device__ __forceinline__ Real magnitude(Real x) {
  return x < 0 ? -x : x;
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

// The magnitude of a stored number as an integer. These are ordered as the numbers are, and NaN
// lies beyond infinity.
__device__ __forceinline__ uint32_t magnitude_bits(Half x) {
  return x.bits & 0x7fffu;
}
__device__ __forceinline__ uint32_t magnitude_bits(BFloat16 x) {
  return x.bits & 0x7fffu;
}
__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}
__device__ __forceinline__ uint64_t magnitude_bits(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffu;
}

template <class Stored>
using MagnitudeBits = decltype(magnitude_bits(Stored()));

__device__ __forceinline__ void from_bits(uint32_t bits, Half* to) {
  to->bits = static_cast<uint16_t>(bits);
}
__device__ __forceinline__ void from_bits(uint32_t bits, BFloat16* to) {
  to->bits = static_cast<uint16_t>(bits);
}
__device__ __forceinline__ void from_bits(uint32_t bits, float* to) {
  *to = __uint_as_float(bits);
}
__device__ __forceinline__ void from_bits(uint64_t bits, double* to) {
  *to = __longlong_as_double(static_cast<long long>(bits));
}

// The largest magnitude of some stored numbers.
template <class Stored>
struct LargestMagnitude {
  MagnitudeBits<Stored> bits = 0;

  __device__ __forceinline__ void take_bits(MagnitudeBits<Stored> other) {
    bits = bits < other ? other : bits;
  }
  template <int kWidth>
  __device__ __forceinline__ void take(const Stored (&numbers)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) take_bits(magnitude_bits(numbers[i]));
  }

  __device__ __forceinline__ LargestMagnitude of_warp() const {
    LargestMagnitude most = *this;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      most.take_bits(__shfl_xor_sync(kWholeWarp, most.bits, step));
    }
    return most;
  }

  __device__ __forceinline__ Computed<Stored> value() const {
    Stored x;
    from_bits(bits, &x);
    return widen(x);
  }
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

  // Calls `vector` with the places of this thread's vectors, then `element` with those of the
  // elements that are left.
  template <int kUnroll, class Vector, class Element>
  static __device__ __forceinline__ void each(const Part& chunk, Vector vector, Element element) {
    const int32_t vectors = chunk.is_aligned() ? chunk.count / kVector : 0;
#pragma unroll kUnroll
    for (int32_t i = threadIdx.x; i < vectors; i += kPreParamThreads) vector(i * kVector);
    for (int32_t i = vectors * kVector + threadIdx.x; i < chunk.count; i += kPreParamThreads) {
      element(i);
    }
  }

  // Calls `visit` with the stepped elements of this thread and their places. One vector of each
  // tensor is enough in flight; two would spill registers.
  template <class Visit>
  static __device__ __forceinline__ void each_stepped(const Arguments& a,
                                                      const PreParamNumbers<Real>& numbers,
                                                      const Part& chunk, Visit visit) {
    each<1>(
        chunk, [&](int32_t at) { visit(step<kVector>(a, numbers, chunk, at), at); },
        [&](int32_t at) { visit(step<1>(a, numbers, chunk, at), at); });
  }

  static __device__ __forceinline__ void step_all(const Arguments& a, unsigned char* shared) {
    if (a.device.found_inf && *a.device.found_inf != 0) return;
    const Part chunk = locate(a);
    LargestMagnitude<PreParam> pre_param, momentum;
    each_stepped(a, current_numbers(a), chunk, [&](const auto& to, int32_t at) {
      write(to, chunk, at);
      pre_param.take(to.pre_param);
      momentum.take(to.momentum);
    });
    if (a.device.largest) leave(a, pre_param, momentum, shared);
  }

  // Leaves the largest magnitudes of the block, to which every thread adds its own.
  static __device__ __forceinline__ void leave(const Arguments& a,
                                               LargestMagnitude<PreParam> pre_param,
                                               LargestMagnitude<PreParam> momentum,
                                               unsigned char* shared) {
    auto* const of_warps = reinterpret_cast<LargestMagnitude<PreParam>*>(shared);
    pre_param = pre_param.of_warp();
    momentum = momentum.of_warp();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      of_warps[2 * warp] = pre_param;
      of_warps[2 * warp + 1] = momentum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kPreParamThreads / 32; ++i) {
      pre_param.take_bits(of_warps[2 * i].bits);
      momentum.take_bits(of_warps[2 * i + 1].bits);
    }
    const Real largest[2] = {pre_param.value(), momentum.value()};
    ca3d::write<2>(largest_of_block(a), largest);
  }

  // Where the largest magnitudes of this block lie: theta's and momentum's.
  static __device__ __forceinline__ Real* largest_of_block(const Arguments& a) {
    return static_cast<Real*>(a.device.largest) + 2 * static_cast<int64_t>(blockIdx.x);
  }

  static __device__ __forceinline__ void find_overflows(const Arguments& a,
                                                        unsigned char* /*shared*/) {
    const PreParamNumbers<Real> numbers = current_numbers(a);
    const Part chunk = locate(a);
    if (a.device.largest && gradients_suffice(a, numbers, chunk)) return;
    bool finite = true;
    each_stepped(a, numbers, chunk,
                 [&](const auto& to, int32_t) { finite = finite && is_finite(to); });
    // Once a warp: where every gradient overflows, all threads would queue at one address. All of
    // them come here.
    if (__any_sync(kWholeWarp, !finite) && threadIdx.x % 32 == 0) {
      atomicExch(a.device.found_inf, 1.0f);
    }
  }

  // Whether the gradients of this warp, and what the last step left, tell that nothing overflows.
  // The same for all of its threads.
  static __device__ __forceinline__ bool gradients_suffice(const Arguments& a,
                                                           const PreParamNumbers<Real>& numbers,
                                                           const Part& chunk) {
    LargestMagnitude<Param> most;
    each<2>(
        chunk, [&](int32_t at) { take<kVector>(chunk.grad + at, &most); },
        [&](int32_t at) { take<1>(chunk.grad + at, &most); });
    most = most.of_warp();
    bool safe = true;
    // One lane reads for all.
    if (threadIdx.x % 32 == 0) {
      Real largest[2];
      read<2>(largest_of_block(a), largest);
      safe = is_safe(a, numbers, chunk, static_cast<Real>(most.value()), {largest[0], largest[1]});
    }
    return !__any_sync(kWholeWarp, !safe);
  }

  // Whether nothing that a step makes of gradients up to `grad`, and of theta and m up to the
  // largest that were stored, can overflow, on the way or at the end. Every term of these sums is a
  // magnitude, and the factor covers their rounding. If one isn't finite, a comparison fails.
  static __device__ __forceinline__ bool is_safe(const Arguments& a, const PreParamNumbers<Real>& x,
                                                 const Part& chunk, Real grad,
                                                 const PreParamLargest<Real>& largest) {
    // A compensation is at most half an ulp of theta: 2^-8 of it in bfloat16.
    const Real theta = largest.pre_param * static_cast<Real>(1 + 0x1p-8);
    const Real d = grad * magnitude(x.gradient_scale) + theta * magnitude(x.weight_decay);
    // Without momentum the largest is 0. Used all the same, so that one access reads the pair:
    // where it is used in one branch alone, nvcc 13.0 takes the access apart for sm_120.
    const Real share = chunk.momentum ? magnitude(x.fresh) : 1;
    const Real m = largest.momentum * magnitude(x.momentum) + d * share;
    const Real by = a.nesterov ? d + m * magnitude(x.momentum) : m;
    const Real stepped = theta + by * magnitude(x.lr);
    constexpr Real kRounding = static_cast<Real>(1.01);
    return by * kRounding < kInfinity<Real> && m * kRounding < kLargestFinite<PreParam> &&
           stepped * kRounding < kLargestFinite<PreParam> &&
           stepped * kRounding < kLargestFinite<Param> * magnitude(x.scale);
  }

  template <int kWidth>
  static __device__ __forceinline__ void take(const Param* from, LargestMagnitude<Param>* most) {
    Param numbers[kWidth];
    read<kWidth>(from, numbers);
    most->take(numbers);
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
    CA3D_DYNAMIC_SHARED(shared);                                                                \
    Kernel<Rounding, Param, PreParam, kTensors>::function(arguments, shared);                   \
  }

// The step with a way of rounding, and the search for what would overflow, which bounds it.
#define CA3D_ENTRIES_OF_TABLE(Rounding, Bound, Param, PreParam, suffix, kTensors, size)           \
  CA3D_ENTRY(Rounding, step_all, ca3d_preparam_step_##suffix##_##size, Param, PreParam, kTensors) \
  CA3D_ENTRY(Bound, find_overflows, ca3d_preparam_overflows_##suffix##_##size, Param, PreParam,   \
             kTensors)

// CUDA before 12.1 has no arguments above 4 KB.
#if CUDART_VERSION >= 12010
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
    for (const PreParamLaunch& one : plan_preparam(runs, count, allows_large_tables())) {
      if (one.large) {
        check(launch(asks_overflows ? large_overflows : large_step, one.grid, kPreParamThreads,
                     kPreParamShared<Real>, stream,
                     arguments_of<Real, kLargeTable>(x, one, runs, addresses)));
      } else {
        check(launch(asks_overflows ? overflows : step, one.grid, kPreParamThreads,
                     kPreParamShared<Real>, stream,
                     arguments_of<Real, kSmallTable>(x, one, runs, addresses)));
      }
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

bool allows_large_tables() {
  static const int driver = cuda_driver_version();
  return CA3D_LARGE_TABLES && (driver == 0 || driver >= 12010);
}

void run_preparam_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       const PreParamDevice& addresses, int device, void* stream) {
  run(step, runs, count, addresses, false, device, stream);
}

void run_preparam_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                            const PreParamDevice& addresses, int device, void* stream) {
  run(step, runs, count, addresses, true, device, stream);
}

}  // namespace ca3d
