// Compares the pre-parameter kernels of every instruction set that this machine runs with the
// definition in preparam_step.h, bit for bit, one element at a time. Prints the instruction sets;
// fails with a message. To be compiled without contraction of products and sums, as the kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "numbers.h"
#include "preparam_step/preparam_step.h"

namespace {

using ca3d::PreParamRun;
using ca3d::PreParamStep;

struct Types {
  Format param, pre_param;
};

const Types kTypes[] = {{kFloat32, kFloat32}, {kFloat64, kFloat64},   {kFloat16, kFloat16},
                        {kFloat16, kFloat32}, {kBFloat16, kBFloat16}, {kBFloat16, kFloat32}};

// ---- tensors ----

double infinity() {
  return std::numeric_limits<double>::infinity();
}

double largest(const Format& format) {
  return std::ldexp(2 - std::ldexp(1.0, 1 - format.digits), 1 - format.min_exponent);
}

// Contiguous numbers that start anywhere; the allocation ends with the last one, so that a
// sanitizer sees every access beyond it.
class Numbers {
 public:
  Numbers(int64_t count, const Format& format, int exponent = 3)
      : format_(format), start_(random_below(4)), memory_((start_ + count) * format.bytes) {
    for (int64_t i = 0; i < count; ++i) {
      set(i, std::ldexp(random_number(), static_cast<int>(exponent - random_below(24))));
    }
  }

  void* data() { return at(0); }
  double get(int64_t i) const { return read(const_cast<Numbers*>(this)->at(i), format_); }
  void set(int64_t i, double x) { write(at(i), x, format_); }
  void set_bits(int64_t i, uint16_t bits) { std::memcpy(at(i), &bits, 2); }
  const Format& format() const { return format_; }

  // Same bits, or both NaN: which NaN is nobody's promise.
  bool equals(int64_t i, const Numbers& other) const {
    const double a = get(i), b = other.get(i);
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
  }

 private:
  char* at(int64_t i) {
    return memory_.data() + (start_ + i) * static_cast<int64_t>(format_.bytes);
  }

  Format format_;
  int64_t start_;
  std::vector<char> memory_;
};

struct Tensor {
  Tensor(int64_t size, const Types& types)
      : count(size),
        number(static_cast<uint32_t>(random_bits())),
        param(size, types.param),
        grad(size, types.param),
        pre_param(size, types.pre_param),
        momentum(size, types.pre_param),
        compensation(size, types.pre_param, -8) {}

  PreParamRun run(bool with_momentum, bool with_compensation) {
    return {param.data(),
            grad.data(),
            pre_param.data(),
            with_momentum ? momentum.data() : nullptr,
            with_compensation ? compensation.data() : nullptr,
            count,
            number};
  }

  int64_t count;
  uint32_t number;
  Numbers param, grad, pre_param, momentum, compensation;
};

struct Case {
  PreParamStep step;
  Types types;
  bool with_momentum;
  std::vector<Tensor> tensors;

  bool is(ca3d::Rounding rounding) const { return ca3d::applied_rounding(step) == rounding; }
};

// ---- the definition ----

// The share of element i of a tensor in the words of Philox4x32-10: 16 bits for theta, the low
// ones, and 16 for its momentum.
uint32_t draw(const PreParamStep& step, uint32_t number, uint64_t i) {
  uint64_t key[2] = {step.seed & 0xffffffff, step.seed >> 32};
  const uint64_t block = 4 * (i / 32) + i % 16 / 4;
  uint64_t x[4] = {block & 0xffffffff, block >> 32, number, step.steps};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = x[0] * 0xd2511f53, b = x[2] * 0xcd9e8d57;
    x[0] = (b >> 32) ^ x[1] ^ key[0];
    x[1] = b & 0xffffffff;
    x[2] = (a >> 32) ^ x[3] ^ key[1];
    x[3] = a & 0xffffffff;
    key[0] = (key[0] + 0x9e3779b9) & 0xffffffff;
    key[1] = (key[1] + 0xbb67ae85) & 0xffffffff;
  }
  const uint64_t word = x[i % 4];
  return static_cast<uint32_t>(i % 32 < 16 ? word : word << 16 | word >> 16);
}

// Stores one of the neighbours of x: the upper one (in magnitude) if its share of the distance and
// that of the random number add up to 1.
void store_stochastically(Numbers& to, int64_t i, double x, uint32_t random) {
  const Format& format = to.format();
  const int fraction_bits = format.digits - 1, dropped = 23 - fraction_bits;
  if (!std::isfinite(x) || std::fabs(x) >= largest(format)) return to.set(i, x);
  const int exponent = x == 0 ? format.min_exponent : std::max(std::ilogb(x), format.min_exponent);
  // In units of the last place. A subnormal float16 first gets the digits of a normal one.
  double units = std::ldexp(std::fabs(x), fraction_bits - exponent);
  units = std::ldexp(std::nearbyint(std::ldexp(units, dropped)), -dropped);
  const double share = std::ldexp(random >> (16 - dropped), -dropped);
  const int bits = (exponent - format.min_exponent) << fraction_bits;
  to.set_bits(i, static_cast<uint16_t>((bits + static_cast<int>(std::floor(units + share))) |
                                       (std::signbit(x) ? 0x8000 : 0)));
}

// Steps element i in place, Real being the type that is computed in. Whether a value was stored
// that isn't finite, or the gradient holds one; with stochastic rounding, whether one could be.
template <class Real>
bool define(const Case& c, Tensor& x, int64_t i) {
  const bool compensated = c.is(ca3d::Rounding::kCompensated);
  const bool stochastic = c.is(ca3d::Rounding::kStochastic);
  const uint32_t random = draw(c.step, x.number, static_cast<uint64_t>(i));
  const Real lr = static_cast<Real>(c.step.lr), momentum = static_cast<Real>(c.step.momentum);
  const Real fresh = static_cast<Real>(1 - c.step.dampening);
  const Real weight_decay = static_cast<Real>(c.step.weight_decay);
  const Real scale = static_cast<Real>(c.step.scale);
  const Real gradient_scale = static_cast<Real>(c.step.gradient_scale);
  const Real g = static_cast<Real>(x.grad.get(i));
  const Real theta = static_cast<Real>(x.pre_param.get(i));
  const Real rest = compensated ? static_cast<Real>(x.compensation.get(i)) : 0;
  const Real d = gradient_scale * g + weight_decay * (compensated ? theta + rest : theta);
  Real m = d;
  if (c.with_momentum) {
    m = momentum * static_cast<Real>(x.momentum.get(i)) + fresh * d;
    stochastic ? store_stochastically(x.momentum, i, m, random >> 16) : x.momentum.set(i, m);
  }
  const Real update = lr * (c.step.nesterov ? d + momentum * m : m);
  bool could_overflow = false;
  if (compensated) {
    const Real change = rest - update;
    x.pre_param.set(i, theta + change);
    x.compensation.set(i, change - (static_cast<Real>(x.pre_param.get(i)) - theta));
  } else if (stochastic) {
    store_stochastically(x.pre_param, i, theta - update, 0xffff);
    x.param.set(i, static_cast<Real>(x.pre_param.get(i)) / scale);
    could_overflow = !std::isfinite(x.param.get(i));
    store_stochastically(x.pre_param, i, theta - update, random & 0xffff);
  } else {
    x.pre_param.set(i, theta - update);
  }
  x.param.set(i, static_cast<Real>(x.pre_param.get(i)) / scale);
  return could_overflow ||
         !(std::isfinite(g) && std::isfinite(x.pre_param.get(i)) && std::isfinite(x.param.get(i)) &&
           (!c.with_momentum || std::isfinite(x.momentum.get(i))));
}

// ---- the comparison ----

[[noreturn]] void fail(const Case& c, const char* what) {
  std::printf(
      "FAILED %s %s (pre-parameters %s): %s; lr %g momentum %g%s dampening %g weight_decay %g "
      "scale %g gradient_scale %g nesterov %d rounding %d; sizes",
      ca3d::isa_name(ca3d::current_isa()), c.types.param.name, c.types.pre_param.name, what,
      c.step.lr, c.step.momentum, c.with_momentum ? "" : " (none)", c.step.dampening,
      c.step.weight_decay, c.step.scale, c.step.gradient_scale, c.step.nesterov,
      static_cast<int>(c.step.rounding));
  for (const Tensor& x : c.tensors) std::printf(" %d", static_cast<int>(x.count));
  std::printf("\n");
  std::exit(1);
}

void compare(const Case& c, const std::vector<Tensor>& expected, const char* when) {
  for (std::size_t n = 0; n < expected.size(); ++n) {
    const Tensor &x = c.tensors[n], &y = expected[n];
    for (int64_t i = 0; i < y.count; ++i) {
      const bool same = x.param.equals(i, y.param) && x.grad.equals(i, y.grad) &&
                        x.pre_param.equals(i, y.pre_param) && x.momentum.equals(i, y.momentum) &&
                        x.compensation.equals(i, y.compensation);
      if (same) continue;
      char what[400];
      std::snprintf(
          what, sizeof(what),
          "%s, tensor %d, element %d: w %.17g theta %.17g m %.17g, expected %.17g %.17g %.17g",
          when, static_cast<int>(n), static_cast<int>(i), x.param.get(i), x.pre_param.get(i),
          x.momentum.get(i), y.param.get(i), y.pre_param.get(i), y.momentum.get(i));
      fail(c, what);
    }
  }
}

// Whether the step overflows.
bool check(const Case& original) {
  std::vector<Tensor> expected = original.tensors;
  bool overflows = false;
  for (Tensor& x : expected) {
    for (int64_t i = 0; i < x.count; ++i) {
      const bool one = original.types.param.bytes == 8 ? define<double>(original, x, i)
                                                       : define<float>(original, x, i);
      overflows = overflows || one;
    }
  }
  for (const int threads : {1, 3}) {
    Case c = original;
    std::vector<PreParamRun> runs;
    for (Tensor& x : c.tensors) {
      runs.push_back(x.run(c.with_momentum, c.is(ca3d::Rounding::kCompensated)));
    }
    const int64_t count = static_cast<int64_t>(runs.size());
    if (ca3d::preparam_sgd_step_overflows(c.step, runs.data(), count, threads) != overflows) {
      fail(c, overflows ? "an overflow goes unnoticed" : "a false overflow");
    }
    compare(c, original.tensors, "written by the search for overflows");
    ca3d::preparam_sgd_step(c.step, runs.data(), count, threads);
    compare(c, expected, threads == 1 ? "one thread" : "three threads");
  }
  return overflows;
}

template <std::size_t kCount>
double one_of(const double (&values)[kCount]) {
  return values[random_below(kCount)];
}

// An element whose step might store a value that isn't finite: any one of them, or several.
void plant_a_special_element(Case& c) {
  Tensor& x = c.tensors[random_below(static_cast<int64_t>(c.tensors.size()))];
  if (x.count == 0) return;
  const int64_t i = random_below(x.count);
  if (c.is(ca3d::Rounding::kCompensated) && random_below(4) == 0) {
    x.compensation.set(i, one_of({infinity(), std::nan("")}));
  }
  for (Numbers* numbers : {&x.grad, &x.pre_param, &x.momentum}) {
    if (random_below(2)) continue;
    const double most = largest(numbers == &x.grad ? c.types.param : c.types.pre_param);
    const double rare = one_of({infinity(), -infinity(), std::nan(""), -most});
    numbers->set(i, random_below(4) ? one_of({most, most / 2}) : rare);
  }
}

Case random_case(const Types& types) {
  const int64_t sizes[] = {0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 513};
  Case c{};
  c.types = types;
  c.with_momentum = random_below(3) > 0;
  c.step.param = types.param.dtype;
  c.step.pre_param = types.pre_param.dtype;
  c.step.lr = one_of({0.0, 1e-4, 0.01, 1.0});
  c.step.momentum = c.with_momentum ? one_of({0.0, 0.5, 0.9}) : 0;
  c.step.dampening = one_of({0.0, 0.0, 0.1});
  c.step.weight_decay = one_of({0.0, 5e-3});
  c.step.scale = one_of({128.0, 100.0, 0.3, -2.0});
  c.step.gradient_scale = one_of({c.step.scale, 1.0, 1.0 / 1024});
  c.step.nesterov = c.with_momentum && random_below(2);
  c.step.rounding = static_cast<ca3d::Rounding>(random_below(3));
  c.step.seed = random_bits();
  c.step.steps = static_cast<uint32_t>(random_bits());
  for (int64_t n = 1 + random_below(4); n > 0; --n) {
    c.tensors.emplace_back(sizes[random_below(11)], types);
  }
  // Now and then more than a thread takes at a time, and enough for several threads.
  if (random_below(8) == 0) c.tensors.emplace_back(2 * ca3d::kPreParamRun + 5, types);
  if (random_below(4)) plant_a_special_element(c);
  return c;
}

// Overflows of a single stored value, in an element at the end of a vector or after it: theta stays
// as it is, without a learning rate.
void check_lone_overflows(const Types& types) {
  for (const int64_t i : {15, 16}) {
    Case c{};
    c.types = types;
    c.with_momentum = true;
    c.step.param = types.param.dtype;
    c.step.pre_param = types.pre_param.dtype;
    c.step.momentum = 0.9;
    c.step.scale = 0.5;
    c.step.gradient_scale = 1;
    c.tensors.emplace_back(17, types);
    if (check(c)) fail(c, "an overflow without a reason");
    Case of_momentum = c, of_param = c;
    of_momentum.tensors[0].momentum.set(i, largest(types.pre_param));
    of_momentum.tensors[0].grad.set(i, largest(types.param));
    of_momentum.step.gradient_scale = largest(types.pre_param) / largest(types.param) / 4;
    if (!check(of_momentum)) fail(of_momentum, "the momentum should overflow");
    of_param.tensors[0].pre_param.set(i, largest(types.param));
    if (!check(of_param)) fail(of_param, "the weight should overflow");
  }
}

}  // namespace

// Usage: preparam_parity [cases for each instruction set and types]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    for (const Types& types : kTypes) {
      random_state = 1;
      check_lone_overflows(types);
      int overflows = 0;
      for (int i = 0; i < cases; ++i) overflows += check(random_case(types));
      if (cases >= 8 && (overflows == 0 || overflows == cases)) {
        std::printf("FAILED: %d of %d cases overflow, which tests nothing\n", overflows, cases);
        return 1;
      }
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
