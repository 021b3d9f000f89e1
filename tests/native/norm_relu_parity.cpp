// Compares the kernels of norm_relu_conv of every instruction set that this machine runs with the
// definitions in norm_relu_conv.h, computed in double one element at a time. Prints the instruction
// sets; fails with a message.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "norm_relu_conv/norm_relu_conv.h"
#include "numbers.h"

namespace {

const Format kFormats[] = {kFloat32, kFloat64, kFloat16, kBFloat16};

// A matrix that starts anywhere; the allocation ends with its last number, so that a sanitizer sees
// every access beyond it.
class Matrix {
 public:
  Matrix(int64_t count, const Format& format, double offset = 0)
      : format_(format), start_(random_below(4)), memory_((start_ + count) * format.bytes) {
    for (int64_t i = 0; i < count; ++i) write(at(i), random_number() + offset, format);
  }

  void* data() { return at(0); }
  double operator[](int64_t i) const { return read(const_cast<Matrix*>(this)->at(i), format_); }

 private:
  char* at(int64_t i) { return memory_.data() + (start_ + i) * format_.bytes; }

  Format format_;
  std::size_t start_;
  std::vector<char> memory_;
};

struct Case {
  Format format;
  ca3d::NormReluProblem problem;
  int threads;
};

[[noreturn]] void fail(const Case& c, const char* what, int64_t i, double actual, double expected) {
  std::printf("FAILED: %s %s %lld is %.17g, not %.17g (%lld rows of %lld, relu %d, %d threads)\n",
              c.format.name, what, static_cast<long long>(i), actual, expected,
              static_cast<long long>(c.problem.rows), static_cast<long long>(c.problem.channels),
              c.problem.relu, c.threads);
  std::exit(1);
}

// What arithmetic on numbers of this size may be off by.
double arithmetic(const Case& c, double size) {
  return 8 * c.format.computed_epsilon * size;
}

// What rounding to storage may be off by; `wide` storage is float.
double storage(const Format& format, double value) {
  return std::ldexp(std::fabs(value), -format.digits) +
         std::ldexp(1.0, format.min_exponent - format.digits);
}

void expect_near(const Case& c, const char* what, int64_t i, double actual, double expected,
                 double bound) {
  if (!(std::fabs(actual - expected) <= bound)) fail(c, what, i, actual, expected);
}

void check(const Case& c) {
  const int64_t channels = c.problem.channels, count = c.problem.rows * channels;
  const double rows = static_cast<double>(c.problem.rows);
  Matrix y(count, c.format, 0.25), residual(count, c.format), dz(count, c.format);
  Matrix more(count, c.format), z(count, c.format), dy(count, c.format);
  Matrix wide(count, c.format.bytes == 8 ? kFloat64 : kFloat32);
  const auto x = [&](int64_t i) { return c.problem.relu ? std::max(y[i], 0.0) : y[i]; };

  std::vector<double> mean(channels), variance(channels);
  ca3d::norm_relu_statistics(c.problem, y.data(), mean.data(), variance.data(), c.threads);
  // Up to 128 rows are summed in the type that is computed in.
  const double sums = 128 * c.format.computed_epsilon;
  std::vector<double> scale, bias, offset, slope;
  for (int64_t k = 0; k < channels; ++k) {
    double m = 0, v = 0;
    for (int64_t i = k; i < count; i += channels) m += x(i) / rows;
    for (int64_t i = k; i < count; i += channels) v += (x(i) - m) * (x(i) - m) / rows;
    expect_near(c, "mean", k, mean[k], m, 2 * sums);
    expect_near(c, "variance", k, variance[k], v, 4 * sums);
    for (std::vector<double>* of : {&scale, &bias, &offset, &slope}) {
      of->push_back(random_number());
    }
  }

  const ca3d::NormReluCoefficients numbers = {mean.data(), scale.data(), bias.data(), offset.data(),
                                              slope.data()};
  void* const summand = random_below(2) ? residual.data() : nullptr;
  ca3d::norm_relu_apply(c.problem, numbers, y.data(), summand, z.data(), false, c.threads);
  ca3d::norm_relu_apply(c.problem, numbers, y.data(), summand, wide.data(), true, c.threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = i % channels;
    const double value = (x(i) - mean[k]) * scale[k] + bias[k] + (summand ? residual[i] : 0.0);
    const double bound = arithmetic(c, 4) + storage(c.format, value);
    expect_near(c, "z", i, z[i], value, bound);
    if (wide[i] != z[i]) fail(c, "wide z", i, wide[i], z[i]);
  }

  std::vector<double> total(channels), product(channels), sum(channels), products(channels);
  const bool adds = random_below(2);
  std::vector<double> added;
  for (int64_t i = 0; i < count; ++i) added.push_back(dz[i] + (adds ? more[i] : 0.0));
  ca3d::norm_relu_reduce(c.problem, mean.data(), y.data(), dz.data(), adds ? more.data() : nullptr,
                         total.data(), product.data(), c.threads);
  for (int64_t i = 0; i < count; ++i) {
    expect_near(c, "dz", i, dz[i], added[i], arithmetic(c, 2) + storage(c.format, added[i]));
    sum[i % channels] += dz[i];
    products[i % channels] += dz[i] * (x(i) - mean[i % channels]);
  }
  for (int64_t k = 0; k < channels; ++k) {
    // The kernel adds what it stored, or what it was before it was rounded.
    const double rounding = rows * (sums * 4 + (adds ? std::ldexp(2.0, -c.format.digits) : 0));
    expect_near(c, "sum of dz", k, total[k], sum[k], rounding);
    expect_near(c, "sum of products", k, product[k], products[k], 2 * rounding);
  }

  ca3d::norm_relu_backward(c.problem, numbers, y.data(), dz.data(), dy.data(), c.threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = i % channels;
    const bool masked = c.problem.relu && y[i] <= 0;
    const double value =
        masked ? 0.0 : scale[k] * (dz[i] - offset[k] - (x(i) - mean[k]) * slope[k]);
    const double bound = arithmetic(c, 6) + storage(c.format, value);
    expect_near(c, "dy", i, dy[i], value, bound);
  }
  // In place: the same numbers.
  ca3d::norm_relu_backward(c.problem, numbers, y.data(), dz.data(), dz.data(), c.threads);
  for (int64_t i = 0; i < count; ++i) {
    if (dz[i] != dy[i]) fail(c, "dy in place", i, dz[i], dy[i]);
  }
}

Case random_case(const Format& format) {
  const int64_t rows[] = {1, 2, 3, 15, 16, 17, 40, 130}, channels[] = {1, 2, 3, 5, 8, 16, 24, 70};
  Case c{format, {}, static_cast<int>(1 + random_below(3))};
  c.problem.dtype = format.dtype;
  c.problem.rows = rows[random_below(8)];
  c.problem.channels = channels[random_below(8)];
  c.problem.relu = random_below(2);
  // Now and then enough for several tasks and threads.
  if (random_below(8) == 0) c.problem.rows = 3000 + random_below(4000);
  return c;
}

}  // namespace

// Usage: norm_relu_parity [cases for each instruction set and type]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    for (const Format& format : kFormats) {
      random_state = 1;
      for (int i = 0; i < cases; ++i) check(random_case(format));
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
