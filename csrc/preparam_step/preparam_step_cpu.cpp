// CPU kernels of the pre-parameter SGD step. Compiled once per instruction set, without contraction
// of products and sums into fused operations.
#include <cstring>

#include "common/simd.h"
#include "preparam_step/preparam_step.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

template <class Stored>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};

// The nearest value that the storage holds, ties to even.
struct Nearest {
  template <class Stored, class Real>
  static void store(Stored* to, Vector<Real> x) {
    ca3d::CA3D_ISA::store(to, x);
  }
};

// The constants of a step in the type that it computes in.
template <class Real>
struct Constants {
  explicit Constants(const PreParamStep& step)
      : lr(static_cast<Real>(step.lr)),
        momentum(static_cast<Real>(step.momentum)),
        fresh(static_cast<Real>(1 - step.dampening)),
        weight_decay(static_cast<Real>(step.weight_decay)),
        scale(static_cast<Real>(step.scale)),
        gradient_scale(static_cast<Real>(step.gradient_scale)),
        nesterov(step.nesterov) {}

  Real lr, momentum, fresh, weight_decay, scale, gradient_scale;
  bool nesterov;
};

template <class Real>
struct Stepped {
  Vector<Real> pre_param, momentum;
};

template <bool kMomentum, class Real>
inline Stepped<Real> stepped(const Constants<Real>& c, Vector<Real> grad, Vector<Real> pre_param,
                             Vector<Real> momentum) {
  const Vector<Real> d = grad * c.gradient_scale + pre_param * c.weight_decay;
  if (!kMomentum) return {pre_param - d * c.lr, momentum};
  const Vector<Real> m = momentum * c.momentum + d * c.fresh;
  return {pre_param - (c.nesterov ? d + m * c.momentum : m) * c.lr, m};
}

template <class Rounding, class Stored, class Real>
inline Vector<Real> as_stored(Vector<Real> x) {
  Stored stored[kLanes<Real>];
  Rounding::template store<Stored, Real>(stored, x);
  return load(stored);
}

template <class Real>
inline Vector<Real> magnitude(Vector<Real> x) {
  return x < 0 ? -x : x;
}

template <class Real>
inline Real largest_lane(Vector<Real> x) {
  Real most = x[0];
  for (int lane = 1; lane < kLanes<Real>; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
}

// Whether all lanes are 0; a NaN is not.
template <class Real>
inline bool is_zero(Vector<Real> x) {
  Real sum = 0;
  for (int lane = 0; lane < kLanes<Real>; ++lane) sum += x[lane];
  return sum == 0;
}

// Largest finite value of a stored type.
template <class Stored>
constexpr double kLargest = 0;
template <>
constexpr double kLargest<Half> = 65504;
template <>
constexpr double kLargest<BFloat16> = 0x1.fep127;
template <>
constexpr double kLargest<float> = 0x1.fffffep127;
template <>
constexpr double kLargest<double> = 0x1.fffffffffffffp1023;

// The elements of a run that don't fill a vector, followed by zeros.
template <class Stored, int kCount>
struct Rest {
  Rest(const Stored* from, int64_t count) { std::memcpy(values, from, count * sizeof(Stored)); }
  void write(Stored* to, int64_t count) const { std::memcpy(to, values, count * sizeof(Stored)); }

  Stored values[kCount] = {};
};

template <class Rounding, bool kMomentum, class Param, class PreParam>
struct Kernel {
  using Real = typename Computed<PreParam>::Type;
  static constexpr int kCount = kLanes<Real>;

  // Largest magnitudes of what a step would store, and a sum that is NaN instead of 0 if one of
  // them isn't finite. A gradient that isn't finite makes theta so. Max drops NaN: hence the sum.
  struct Magnitudes {
    Vector<Real> pre_param = {}, momentum = {}, check = {};

    void take(const Stepped<Real>& to) {
      pre_param = max<Real>(magnitude<Real>(to.pre_param), pre_param);
      momentum = max<Real>(magnitude<Real>(to.momentum), momentum);
      check += to.pre_param - to.pre_param;
    }
  };

  // Momentum is read and written only if the step has one.
  static void step_vector(const Constants<Real>& c, Param* param, const Param* grad,
                          PreParam* pre_param, PreParam* momentum, Magnitudes* magnitudes) {
    const Vector<Real> old = kMomentum ? load(momentum) : Vector<Real>{};
    const Stepped<Real> to = stepped<kMomentum, Real>(c, load(grad), load(pre_param), old);
    if (kMomentum) Rounding::template store<PreParam, Real>(momentum, to.momentum);
    Rounding::template store<PreParam, Real>(pre_param, to.pre_param);
    store(param, load(pre_param) / c.scale);
    magnitudes->take(to);
  }

  static void extend(Magnitudes* extent, const Constants<Real>& c, const Param* grad,
                     const PreParam* pre_param, const PreParam* momentum) {
    const Vector<Real> old = kMomentum ? load(momentum) : Vector<Real>{};
    extent->take(stepped<kMomentum, Real>(c, load(grad), load(pre_param), old));
  }

  // Rounding and division are monotonic, so that the largest magnitudes tell for all.
  static bool overflows(const Magnitudes& extent, const Constants<Real>& c) {
    const Vector<Real> theta = as_stored<Rounding, PreParam, Real>(extent.pre_param);
    const Vector<Real> m = as_stored<Rounding, PreParam, Real>(extent.momentum);
    const Vector<Real> w = as_stored<Nearest, Param, Real>(theta / c.scale);
    return !is_zero<Real>(extent.check + (theta - theta) + (m - m) + (w - w));
  }

  // What was stored; unknown if something wasn't finite.
  static PreParamLargest largest(const Magnitudes& stored) {
    if (!is_zero<Real>(stored.check)) return {__builtin_nan(""), __builtin_nan("")};
    return {largest_lane<Real>(as_stored<Rounding, PreParam, Real>(stored.pre_param)),
            largest_lane<Real>(as_stored<Rounding, PreParam, Real>(stored.momentum))};
  }

  // Whether nothing that a step makes of so large a gradient can overflow, on the way or at the
  // end. Every term of these sums is a magnitude, and the factor covers their rounding.
  static bool is_safe(const Constants<Real>& c, double grad, const PreParamLargest& largest) {
    const auto magnitude = [](Real x) { return static_cast<double>(x < 0 ? -x : x); };
    const double d =
        grad * magnitude(c.gradient_scale) + largest.pre_param * magnitude(c.weight_decay);
    const double m =
        kMomentum ? largest.momentum * magnitude(c.momentum) + d * magnitude(c.fresh) : d;
    const double by = c.nesterov ? d + m * magnitude(c.momentum) : m;
    const double pre_param = largest.pre_param + by * magnitude(c.lr);
    constexpr double kRounding = 1.01;
    return d * kRounding < kLargest<Real> && by * kRounding < kLargest<Real> &&
           m * kRounding < kLargest<PreParam> && pre_param * kRounding < kLargest<PreParam> &&
           pre_param * kRounding < kLargest<Param> * magnitude(c.scale);
  }

  // Whether only the gradient had to be read to see that the step doesn't overflow.
  static bool is_safe(const Constants<Real>& c, const PreParamRun& run,
                      const PreParamLargest& largest) {
    const Param* grad = static_cast<const Param*>(run.grad);
    Vector<Real> most = {}, check = {};
    int64_t at = 0;
    for (; at < run.count; at += kCount) {
      Vector<Real> g;
      if (at + kCount <= run.count) {
        g = load(grad + at);
      } else {
        g = load(Rest<Param, kCount>(grad + at, run.count - at).values);
      }
      most = max<Real>(magnitude<Real>(g), most);
      check += g - g;
    }
    return is_zero<Real>(check) && is_safe(c, largest_lane<Real>(most), largest);
  }

  static Magnitudes step(const Constants<Real>& c, const PreParamRun& run) {
    Param* param = static_cast<Param*>(run.param);
    const Param* grad = static_cast<const Param*>(run.grad);
    PreParam* pre_param = static_cast<PreParam*>(run.pre_param);
    PreParam* momentum = static_cast<PreParam*>(run.momentum);
    Magnitudes stored;
    int64_t at = 0;
    for (; at + kCount <= run.count; at += kCount) {
      step_vector(c, param + at, grad + at, pre_param + at, kMomentum ? momentum + at : nullptr,
                  &stored);
    }
    const int64_t left = run.count - at;
    if (left == 0) return stored;
    Rest<Param, kCount> w(param + at, left), g(grad + at, left);
    Rest<PreParam, kCount> theta(pre_param + at, left);
    Rest<PreParam, kCount> m(kMomentum ? momentum + at : pre_param + at, left);
    step_vector(c, w.values, g.values, theta.values, m.values, &stored);
    w.write(param + at, left);
    theta.write(pre_param + at, left);
    if (kMomentum) m.write(momentum + at, left);
    return stored;
  }

  static bool overflows(const Constants<Real>& c, const PreParamRun& run) {
    const Param* grad = static_cast<const Param*>(run.grad);
    const PreParam* pre_param = static_cast<const PreParam*>(run.pre_param);
    const PreParam* momentum = static_cast<const PreParam*>(run.momentum);
    Magnitudes extent;
    int64_t at = 0;
    for (; at + kCount <= run.count; at += kCount) {
      extend(&extent, c, grad + at, pre_param + at, kMomentum ? momentum + at : nullptr);
    }
    const int64_t left = run.count - at;
    if (left > 0) {
      const Rest<Param, kCount> g(grad + at, left);
      const Rest<PreParam, kCount> theta(pre_param + at, left);
      const Rest<PreParam, kCount> m(kMomentum ? momentum + at : pre_param + at, left);
      extend(&extent, c, g.values, theta.values, m.values);
    }
    return overflows(extent, c);
  }

  static void step_all(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       int threads, PreParamLargest* stored) {
    const Constants<Real> constants(step);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
      const Magnitudes magnitudes = Kernel::step(constants, runs[i]);
      if (stored) stored[i] = largest(magnitudes);
    }
  }

  static bool any_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                            int threads, const PreParamLargest* known) {
    const Constants<Real> constants(step);
    bool any = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(|| : any) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
      const bool safe = any || (known && is_safe(constants, runs[i], known[i]));
      any = any || (!safe && overflows(constants, runs[i]));
    }
    return any;
  }
};

// Calls use(Kernel<...>{}) with the kernel of the step's types.
template <class Rounding, bool kMomentum, class Use>
auto with_types(const PreParamStep& step, Use use) {
  const bool mixed = step.pre_param != step.param;
  switch (step.param) {
    case DType::kFloat16:
      return mixed ? use(Kernel<Rounding, kMomentum, Half, float>{})
                   : use(Kernel<Rounding, kMomentum, Half, Half>{});
    case DType::kBFloat16:
      return mixed ? use(Kernel<Rounding, kMomentum, BFloat16, float>{})
                   : use(Kernel<Rounding, kMomentum, BFloat16, BFloat16>{});
    case DType::kFloat64:
      return use(Kernel<Rounding, kMomentum, double, double>{});
    default:
      return use(Kernel<Rounding, kMomentum, float, float>{});
  }
}

template <class Use>
auto with_kernel(const PreParamStep& step, const PreParamRun* runs, Use use) {
  return runs[0].momentum ? with_types<Nearest, true>(step, use)
                          : with_types<Nearest, false>(step, use);
}

void step_all(const PreParamStep& step, const PreParamRun* runs, int64_t count, int threads,
              PreParamLargest* stored) {
  if (count == 0) return;
  with_kernel(step, runs,
              [&](auto kernel) { kernel.step_all(step, runs, count, threads, stored); });
}

bool any_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count, int threads,
                   const PreParamLargest* known) {
  if (count == 0) return false;
  return with_kernel(step, runs, [&](auto kernel) {
    return kernel.any_overflows(step, runs, count, threads, known);
  });
}

}  // namespace

const PreParamKernels preparam_kernels = {step_all, any_overflows};

}  // namespace CA3D_ISA
}  // namespace ca3d
