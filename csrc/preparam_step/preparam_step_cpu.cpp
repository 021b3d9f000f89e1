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

  // Momentum is read and written only if the step has one.
  static void step_vector(const Constants<Real>& c, Param* param, const Param* grad,
                          PreParam* pre_param, PreParam* momentum) {
    const Vector<Real> old = kMomentum ? load(momentum) : Vector<Real>{};
    const Stepped<Real> to = stepped<kMomentum, Real>(c, load(grad), load(pre_param), old);
    if (kMomentum) Rounding::template store<PreParam, Real>(momentum, to.momentum);
    Rounding::template store<PreParam, Real>(pre_param, to.pre_param);
    store(param, load(pre_param) / c.scale);
  }

  // Largest magnitudes of what a step would store, and a sum that is NaN instead of 0 if one of
  // them isn't finite. A gradient that isn't finite makes theta so. Max drops NaN: hence the sum.
  struct Extent {
    Vector<Real> pre_param = {}, momentum = {}, check = {};
  };

  static void extend(Extent* extent, const Constants<Real>& c, const Param* grad,
                     const PreParam* pre_param, const PreParam* momentum) {
    const Vector<Real> old = kMomentum ? load(momentum) : Vector<Real>{};
    const Stepped<Real> to = stepped<kMomentum, Real>(c, load(grad), load(pre_param), old);
    extent->pre_param = max<Real>(max<Real>(to.pre_param, -to.pre_param), extent->pre_param);
    extent->momentum = max<Real>(max<Real>(to.momentum, -to.momentum), extent->momentum);
    extent->check += to.pre_param - to.pre_param;
  }

  // Rounding and division are monotonic, so that the largest magnitudes tell for all.
  static bool overflows(const Extent& extent, const Constants<Real>& c) {
    const Vector<Real> theta = as_stored<Rounding, PreParam, Real>(extent.pre_param);
    const Vector<Real> m = as_stored<Rounding, PreParam, Real>(extent.momentum);
    const Vector<Real> w = as_stored<Nearest, Param, Real>(theta / c.scale);
    const Vector<Real> check = extent.check + (theta - theta) + (m - m) + (w - w);
    Real sum = 0;
    for (int lane = 0; lane < kCount; ++lane) sum += check[lane];
    return sum != 0;
  }

  static void step(const Constants<Real>& c, const PreParamRun& run) {
    Param* param = static_cast<Param*>(run.param);
    const Param* grad = static_cast<const Param*>(run.grad);
    PreParam* pre_param = static_cast<PreParam*>(run.pre_param);
    PreParam* momentum = static_cast<PreParam*>(run.momentum);
    int64_t at = 0;
    for (; at + kCount <= run.count; at += kCount) {
      step_vector(c, param + at, grad + at, pre_param + at, kMomentum ? momentum + at : nullptr);
    }
    const int64_t left = run.count - at;
    if (left == 0) return;
    Rest<Param, kCount> w(param + at, left), g(grad + at, left);
    Rest<PreParam, kCount> theta(pre_param + at, left);
    Rest<PreParam, kCount> m(kMomentum ? momentum + at : pre_param + at, left);
    step_vector(c, w.values, g.values, theta.values, m.values);
    w.write(param + at, left);
    theta.write(pre_param + at, left);
    if (kMomentum) m.write(momentum + at, left);
  }

  static bool overflows(const Constants<Real>& c, const PreParamRun& run) {
    const Param* grad = static_cast<const Param*>(run.grad);
    const PreParam* pre_param = static_cast<const PreParam*>(run.pre_param);
    const PreParam* momentum = static_cast<const PreParam*>(run.momentum);
    Extent extent;
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
                       int threads) {
    const Constants<Real> constants(step);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) Kernel::step(constants, runs[i]);
  }

  static bool any_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                            int threads) {
    const Constants<Real> constants(step);
    bool any = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(|| : any) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) any = any || overflows(constants, runs[i]);
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

void step_all(const PreParamStep& step, const PreParamRun* runs, int64_t count, int threads) {
  if (count == 0) return;
  with_kernel(step, runs, [&](auto kernel) { kernel.step_all(step, runs, count, threads); });
}

bool any_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count, int threads) {
  if (count == 0) return false;
  return with_kernel(step, runs,
                     [&](auto kernel) { return kernel.any_overflows(step, runs, count, threads); });
}

}  // namespace

const PreParamKernels preparam_kernels = {step_all, any_overflows};

}  // namespace CA3D_ISA
}  // namespace ca3d
