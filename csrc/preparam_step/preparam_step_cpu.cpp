// CPU kernels of the pre-parameter SGD step. Compiled once per instruction set, without contraction
// of products and sums into fused operations.
#include <cstring>

#include "common/philox_simd.h"
#include "common/simd.h"
#include "common/stochastic_simd.h"
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

// ---- ways of rounding ----
//
// Each says of how many vectors it draws the random bits at a time, how theta and momentum are
// stored, and what bounds the stored values whatever is drawn.

struct Nearest {
  static constexpr int kVectors = 1;
  static constexpr bool kCompensates = false;

  template <class Real>
  struct Draw {
    Bits<Real> pre_param[kVectors] = {}, momentum[kVectors] = {};
  };

  explicit Nearest(const PreParamStep&) {}

  template <class Real>
  Draw<Real> draw(const PreParamPiece&, int64_t) const {
    return {};
  }
  template <class Stored, class Real>
  static void store(Stored* to, Vector<Real> x, Bits<Real>) {
    CA3D_ISA::store(to, x);
  }
  template <class Stored, class Real>
  static void store_bound(Stored* to, Vector<Real> x) {
    CA3D_ISA::store(to, x);
  }
};

struct Compensated : Nearest {
  static constexpr bool kCompensates = true;
  using Nearest::Nearest;
};

struct Stochastic {
  static constexpr int kVectors = Drawn::kVectors;
  static constexpr bool kCompensates = false;

  explicit Stochastic(const PreParamStep& step) : keys(step.seed), steps(step.steps) {}

  // Of the elements from `at` of a piece on.
  template <class Real>
  Drawn draw(const PreParamPiece& piece, int64_t at) const {
    return CA3D_ISA::draw(keys, piece.first + at, piece.run.number, steps);
  }
  template <class Stored, class Real>
  static void store(Stored* to, Vector<Real> x, Bits<Real> random) {
    store_stochastically(to, x, random);
  }
  template <class Stored, class Real>
  static void store_bound(Stored* to, Vector<Real> x) {
    store_stochastically(to, x, 0xffff - Bits<Real>{});
  }

  PhiloxKeys keys;
  uint32_t steps;
};

// ---- the step of a vector ----

// Whether x is a power of two, or its negative, and not subnormal.
template <class Real>
inline bool is_power_of_two(Real x) {
  const uint64_t bits = bit_cast<uint64_t>(static_cast<double>(x));
  return __builtin_isnormal(x) && (bits & ((uint64_t{1} << 52) - 1)) == 0;
}

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
        inverse_scale(1 / scale),
        nesterov(step.nesterov) {
    // The inverse of a power of two is exact, and a product with it rounds as the quotient does.
    if (!is_power_of_two(scale) || !is_power_of_two(inverse_scale)) inverse_scale = 0;
  }

  Vector<Real> to_param(Vector<Real> pre_param) const {
    return inverse_scale != 0 ? pre_param * inverse_scale : pre_param / scale;
  }

  Real lr, momentum, fresh, weight_decay, scale, gradient_scale;
  Real inverse_scale;  // 0 if it is not exact
  bool nesterov;
};

// Theta and momentum before they are rounded; with a compensation, theta = old theta + change.
template <class Real>
struct Stepped {
  Vector<Real> pre_param, momentum, change;
};

template <bool kMomentum, bool kCompensates, class Real>
inline Stepped<Real> stepped(const Constants<Real>& c, Vector<Real> grad, Vector<Real> pre_param,
                             Vector<Real> momentum, Vector<Real> rest) {
  const Vector<Real> total = kCompensates ? pre_param + rest : pre_param;
  const Vector<Real> d = grad * c.gradient_scale + total * c.weight_decay;
  Vector<Real> update = d;
  if (kMomentum) {
    momentum = momentum * c.momentum + d * c.fresh;
    update = c.nesterov ? d + momentum * c.momentum : momentum;
  }
  if (!kCompensates) return {pre_param - update * c.lr, momentum, Vector<Real>{}};
  const Vector<Real> change = rest - update * c.lr;
  return {pre_param + change, momentum, change};
}

// What a value no larger than x becomes at most, whatever is drawn.
template <class Rounding, class Stored, class Real>
inline Vector<Real> bound(Vector<Real> x) {
  Stored stored[kLanes<Real>];
  Rounding::template store_bound<Stored, Real>(stored, x);
  return load(stored);
}

template <class Real>
inline Vector<Real> magnitude(Vector<Real> x) {
  constexpr Bits<Real> kAll = ~Bits<Real>{};
  return bit_cast<Vector<Real>>(bit_cast<Bits<Real>>(x) & (kAll >> 1));
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
  static constexpr bool kCompensates = Rounding::kCompensates;

  // Where elements lie; momentum and compensation only if the step has them.
  struct Elements {
    explicit Elements(const PreParamRun& run)
        : param(static_cast<Param*>(run.param)),
          grad(static_cast<const Param*>(run.grad)),
          pre_param(static_cast<PreParam*>(run.pre_param)),
          momentum(static_cast<PreParam*>(run.momentum)),
          compensation(static_cast<PreParam*>(run.compensation)) {}
    Elements(Param* w, const Param* g, PreParam* theta, PreParam* m, PreParam* r)
        : param(w), grad(g), pre_param(theta), momentum(m), compensation(r) {}

    Elements operator+(int64_t at) const {
      return {param + at, grad + at, pre_param + at, kMomentum ? momentum + at : nullptr,
              kCompensates ? compensation + at : nullptr};
    }

    Param* param;
    const Param* grad;
    PreParam* pre_param;
    PreParam* momentum;
    PreParam* compensation;
  };

  // Copies of the elements at the end of a piece that don't fill a vector.
  struct LastElements {
    LastElements(const Elements& from, int64_t count)
        : w(from.param, count),
          g(from.grad, count),
          theta(from.pre_param, count),
          m(kMomentum ? from.momentum : from.pre_param, count),
          r(kCompensates ? from.compensation : from.pre_param, count) {}

    Elements elements() { return {w.values, g.values, theta.values, m.values, r.values}; }
    void write(const Elements& to, int64_t count) const {
      w.write(to.param, count);
      theta.write(to.pre_param, count);
      if (kMomentum) m.write(to.momentum, count);
      if (kCompensates) r.write(to.compensation, count);
    }

    Rest<Param, kCount> w, g;
    Rest<PreParam, kCount> theta, m, r;
  };

  // Largest magnitudes of what a step would store, and a sum that is NaN instead of 0 if one of
  // them isn't finite. A gradient that isn't finite makes theta so, and theta its compensation. Max
  // drops NaN: hence the sum.
  struct Magnitudes {
    Vector<Real> pre_param = {}, momentum = {}, check = {};

    void take(const Stepped<Real>& to) {
      pre_param = max<Real>(magnitude<Real>(to.pre_param), pre_param);
      momentum = max<Real>(magnitude<Real>(to.momentum), momentum);
      check += to.pre_param - to.pre_param;
    }
  };

  static Stepped<Real> stepped_vector(const Constants<Real>& c, const Elements& x) {
    const Vector<Real> momentum = kMomentum ? load(x.momentum) : Vector<Real>{};
    const Vector<Real> rest = kCompensates ? load(x.compensation) : Vector<Real>{};
    return stepped<kMomentum, kCompensates, Real>(c, load(x.grad), load(x.pre_param), momentum,
                                                  rest);
  }

  template <class Draw>
  static void step_vector(const Constants<Real>& c, const Elements& x, const Draw& random, int v,
                          Magnitudes* magnitudes) {
    const Stepped<Real> to = stepped_vector(c, x);
    if (kMomentum) {
      Rounding::template store<PreParam, Real>(x.momentum, to.momentum, random.momentum[v]);
    }
    const Vector<Real> before = kCompensates ? load(x.pre_param) : Vector<Real>{};
    Rounding::template store<PreParam, Real>(x.pre_param, to.pre_param, random.pre_param[v]);
    const Vector<Real> after = load(x.pre_param);
    store(x.param, c.to_param(after));
    if (kCompensates) store(x.compensation, to.change - (after - before));
    magnitudes->take(to);
  }

  // Rounding and division are monotonic, so that the largest magnitudes tell for all.
  static bool overflows(const Magnitudes& extent, const Constants<Real>& c) {
    const Vector<Real> theta = bound<Rounding, PreParam, Real>(extent.pre_param);
    const Vector<Real> m = bound<Rounding, PreParam, Real>(extent.momentum);
    const Vector<Real> w = bound<Nearest, Param, Real>(c.to_param(theta));
    return !is_zero<Real>(extent.check + (theta - theta) + (m - m) + (w - w));
  }

  // What bounds the stored values; unknown if something wasn't finite.
  static PreParamLargest<double> largest(const Magnitudes& stored) {
    if (!is_zero<Real>(stored.check)) return {__builtin_nan(""), __builtin_nan("")};
    return {largest_lane<Real>(bound<Rounding, PreParam, Real>(stored.pre_param)),
            largest_lane<Real>(bound<Rounding, PreParam, Real>(stored.momentum))};
  }

  // Whether nothing that a step makes of so large a gradient can overflow, on the way or at the
  // end. Every term of these sums is a magnitude, and the factor covers their rounding.
  static bool is_safe(const Constants<Real>& c, double grad,
                      const PreParamLargest<double>& largest) {
    const auto magnitude = [](Real x) { return static_cast<double>(x < 0 ? -x : x); };
    // A compensation is at most half an ulp of theta: 2^-8 of it in bfloat16.
    const double theta = largest.pre_param * (kCompensates ? 1 + 0x1p-8 : 1);
    const double d = grad * magnitude(c.gradient_scale) + theta * magnitude(c.weight_decay);
    const double m =
        kMomentum ? largest.momentum * magnitude(c.momentum) + d * magnitude(c.fresh) : d;
    const double by = c.nesterov ? d + m * magnitude(c.momentum) : m;
    const double pre_param = theta + by * magnitude(c.lr);
    constexpr double kRounding = 1.01;
    return d * kRounding < kLargest<Real> && by * kRounding < kLargest<Real> &&
           m * kRounding < kLargest<PreParam> && pre_param * kRounding < kLargest<PreParam> &&
           pre_param * kRounding < kLargest<Param> * magnitude(c.scale);
  }

  // Whether only the gradient had to be read to see that the step doesn't overflow.
  static bool is_safe(const Constants<Real>& c, const PreParamRun& run,
                      const PreParamLargest<double>& largest) {
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

  // Fetches what a loop with much arithmetic will need soon: it leaves the processor no room to
  // look so far ahead.
  static void prefetch(const Elements& x) {
    constexpr int64_t kAhead = 1024, kLine = 64;
    for (int64_t at = 0; at < Rounding::kVectors * kCount; at += kLine / sizeof(Param)) {
      __builtin_prefetch(x.param + kAhead + at, 1);
      __builtin_prefetch(x.grad + kAhead + at);
      __builtin_prefetch(x.pre_param + kAhead + at, 1);
      if (kMomentum) __builtin_prefetch(x.momentum + kAhead + at, 1);
    }
  }

  static Magnitudes step(const Constants<Real>& c, const Rounding& rounding,
                         const PreParamPiece& piece) {
    constexpr int kVectors = Rounding::kVectors;
    const Elements x(piece.run);
    const int64_t count = piece.run.count;
    Magnitudes stored;
    int64_t at = 0;
    for (; at + kVectors * kCount <= count; at += kVectors * kCount) {
      if (kVectors > 1) prefetch(x + at);
      const auto random = rounding.template draw<Real>(piece, at);
      for (int v = 0; v < kVectors; ++v) {
        step_vector(c, x + (at + v * kCount), random, v, &stored);
      }
    }
    if (at == count) return stored;
    const auto random = rounding.template draw<Real>(piece, at);
    int v = 0;
    for (; at + kCount <= count; at += kCount) step_vector(c, x + at, random, v++, &stored);
    if (at == count) return stored;
    LastElements last(x + at, count - at);
    step_vector(c, last.elements(), random, v, &stored);
    last.write(x + at, count - at);
    return stored;
  }

  static bool overflows(const Constants<Real>& c, const PreParamRun& run) {
    const Elements x(run);
    Magnitudes extent;
    int64_t at = 0;
    for (; at + kCount <= run.count; at += kCount) extent.take(stepped_vector(c, x + at));
    if (at < run.count) {
      LastElements last(x + at, run.count - at);
      extent.take(stepped_vector(c, last.elements()));
    }
    return overflows(extent, c);
  }

  static void step_all(const PreParamStep& step, const PreParamPiece* pieces, int64_t count,
                       int threads, PreParamLargest<double>* stored) {
    const Constants<Real> constants(step);
    const Rounding rounding(step);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
      const Magnitudes magnitudes = Kernel::step(constants, rounding, pieces[i]);
      if (stored) stored[i] = largest(magnitudes);
    }
  }

  static bool any_overflows(const PreParamStep& step, const PreParamPiece* pieces, int64_t count,
                            int threads, const PreParamLargest<double>* known) {
    const Constants<Real> constants(step);
    bool any = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(|| : any) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
      const PreParamRun& run = pieces[i].run;
      const bool safe = any || (known && is_safe(constants, run, known[i]));
      any = any || (!safe && overflows(constants, run));
    }
    return any;
  }
};

// Calls use(Kernel<...>{}) with the kernel of the step's types and rounding.
template <bool kMomentum, class Stored, class Use>
auto with_rounding(const PreParamStep& step, Use use) {
  switch (step.rounding) {
    case Rounding::kStochastic:
      return use(Kernel<Stochastic, kMomentum, Stored, Stored>{});
    case Rounding::kCompensated:
      return use(Kernel<Compensated, kMomentum, Stored, Stored>{});
    default:
      return use(Kernel<Nearest, kMomentum, Stored, Stored>{});
  }
}

template <bool kMomentum, class Use>
auto with_types(const PreParamStep& step, Use use) {
  const bool mixed = step.pre_param != step.param;
  switch (step.param) {
    case DType::kFloat16:
      return mixed ? use(Kernel<Nearest, kMomentum, Half, float>{})
                   : with_rounding<kMomentum, Half>(step, use);
    case DType::kBFloat16:
      return mixed ? use(Kernel<Nearest, kMomentum, BFloat16, float>{})
                   : with_rounding<kMomentum, BFloat16>(step, use);
    case DType::kFloat64:
      return use(Kernel<Nearest, kMomentum, double, double>{});
    default:
      return use(Kernel<Nearest, kMomentum, float, float>{});
  }
}

template <class Use>
auto with_kernel(const PreParamStep& step, const PreParamPiece* pieces, Use use) {
  return pieces[0].run.momentum ? with_types<true>(step, use) : with_types<false>(step, use);
}

void step_all(const PreParamStep& step, const PreParamPiece* pieces, int64_t count, int threads,
              PreParamLargest<double>* stored) {
  if (count == 0) return;
  with_kernel(step, pieces,
              [&](auto kernel) { kernel.step_all(step, pieces, count, threads, stored); });
}

bool any_overflows(const PreParamStep& step, const PreParamPiece* pieces, int64_t count,
                   int threads, const PreParamLargest<double>* known) {
  if (count == 0) return false;
  return with_kernel(step, pieces, [&](auto kernel) {
    return kernel.any_overflows(step, pieces, count, threads, known);
  });
}

}  // namespace

const PreParamKernels preparam_kernels = {step_all, any_overflows};

}  // namespace CA3D_ISA
}  // namespace ca3d
