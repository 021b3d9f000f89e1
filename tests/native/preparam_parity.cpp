// Compares the pre-parameter kernels of every instruction set that this machine runs with the
// definition in preparam_step.h, bit for bit, one element at a time. Prints the instruction sets;
// fails with a message. To be compiled without contraction of products and sums, as the kernels.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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
  Numbers(int64_t count, const Format& format)
      : format_(format), start_(random_below(4)), memory_((start_ + count) * format.bytes) {
    for (int64_t i = 0; i < count; ++i) {
      set(i, std::ldexp(random_number(), static_cast<int>(3 - random_below(24))));
    }
  }

  void* data() { return at(0); }
  double get(int64_t i) const { return read(const_cast<Numbers*>(this)->at(i), format_); }
  void set(int64_t i, double x) { write(at(i), x, format_); }

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
        param(size, types.param),
        grad(size, types.param),
        pre_param(size, types.pre_param),
        momentum(size, types.pre_param) {}

  PreParamRun run(bool with_momentum) {
    return {param.data(), grad.data(), pre_param.data(), with_momentum ? momentum.data() : nullptr,
            count};
  }

  int64_t count;
  Numbers param, grad, pre_param, momentum;
};

struct Case {
  PreParamStep step;
  Types types;
  bool with_momentum;
  std::vector<Tensor> tensors;
};

// ---- the definition ----

// Steps element i in place, Real being the type that is computed in. Whether a value was stored
// that isn't finite, or the gradient holds one.
template <class Real>
bool define(const Case& c, Tensor& x, int64_t i) {
  const Real lr = static_cast<Real>(c.step.lr), momentum = static_cast<Real>(c.step.momentum);
  const Real fresh = static_cast<Real>(1 - c.step.dampening);
  const Real weight_decay = static_cast<Real>(c.step.weight_decay);
  const Real scale = static_cast<Real>(c.step.scale);
  const Real gradient_scale = static_cast<Real>(c.step.gradient_scale);
  const Real g = static_cast<Real>(x.grad.get(i));
  const Real theta = static_cast<Real>(x.pre_param.get(i));
  const Real d = gradient_scale * g + weight_decay * theta;
  Real m = d;
  if (c.with_momentum) {
    m = momentum * static_cast<Real>(x.momentum.get(i)) + fresh * d;
    x.momentum.set(i, m);
  }
  x.pre_param.set(i, theta - lr * (c.step.nesterov ? d + momentum * m : m));
  x.param.set(i, static_cast<Real>(x.pre_param.get(i)) / scale);
  return !(std::isfinite(g) && std::isfinite(x.pre_param.get(i)) && std::isfinite(x.param.get(i)) &&
           (!c.with_momentum || std::isfinite(x.momentum.get(i))));
}

// ---- the comparison ----

[[noreturn]] void fail(const Case& c, const char* what) {
  std::printf(
      "FAILED %s %s (pre-parameters %s): %s; lr %g momentum %g%s dampening %g weight_decay %g "
      "scale %g gradient_scale %g nesterov %d; sizes",
      ca3d::isa_name(ca3d::current_isa()), c.types.param.name, c.types.pre_param.name, what,
      c.step.lr, c.step.momentum, c.with_momentum ? "" : " (none)", c.step.dampening,
      c.step.weight_decay, c.step.scale, c.step.gradient_scale, c.step.nesterov);
  for (const Tensor& x : c.tensors) std::printf(" %d", static_cast<int>(x.count));
  std::printf("\n");
  std::exit(1);
}

void compare(const Case& c, const std::vector<Tensor>& expected, const char* when) {
  for (std::size_t n = 0; n < expected.size(); ++n) {
    const Tensor &x = c.tensors[n], &y = expected[n];
    for (int64_t i = 0; i < y.count; ++i) {
      const bool same = x.param.equals(i, y.param) && x.grad.equals(i, y.grad) &&
                        x.pre_param.equals(i, y.pre_param) && x.momentum.equals(i, y.momentum);
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
    for (Tensor& x : c.tensors) runs.push_back(x.run(c.with_momentum));
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
  for (int64_t n = 1 + random_below(4); n > 0; --n) {
    c.tensors.emplace_back(sizes[random_below(11)], types);
  }
  // Now and then more than a thread takes at a time, and enough for several threads.
  if (random_below(8) == 0) c.tensors.emplace_back(2 * ca3d::kPreParamRun + 5, types);
  if (random_below(2)) plant_a_special_element(c);
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
