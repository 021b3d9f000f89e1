// Compares the passes around a convolution, of every instruction set that this machine runs, with
// their definition in norm_relu_conv.h, computed in long double. Prints the instruction sets; fails
// with a message.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "norm_relu_conv/norm_relu_conv.h"
#include "numbers.h"

namespace {

using ca3d::NormReluProblem;
using Wide = long double;

// A matrix that starts anywhere; the allocation ends with its last element, so that a sanitizer
// sees every access beyond it.
class Matrix {
 public:
  Matrix(int64_t count, const Format& format)
      : format_(format), start_(random_below(4)), memory_((start_ + count) * format.bytes) {}

  void* data() { return at(0); }
  double get(int64_t i) const { return read(const_cast<Matrix*>(this)->at(i), format_); }
  void set(int64_t i, double x) { write(at(i), x, format_); }
  bool same_bits(const Matrix& other) const {
    return std::memcmp(memory_.data() + start_ * format_.bytes,
                       other.memory_.data() + other.start_ * format_.bytes,
                       memory_.size() - start_ * format_.bytes) == 0;
  }

 private:
  char* at(int64_t i) {
    return memory_.data() + (start_ + i) * static_cast<int64_t>(format_.bytes);
  }

  Format format_;
  int64_t start_;
  std::vector<char> memory_;
};

struct Case {
  Format format;
  NormReluProblem problem;
  double shift;  // added to all values of y
  bool with_more;
};

[[noreturn]] void fail(const Case& c, const char* what, double found, double expected) {
  std::printf("FAILED %s %s: %s is %.17g, expected %.17g; rows %d channels %d relu %d shift %g\n",
              ca3d::isa_name(ca3d::current_isa()), c.format.name, what, found, expected,
              static_cast<int>(c.problem.rows), static_cast<int>(c.problem.channels),
              c.problem.relu, c.shift);
  std::exit(1);
}

void require_near(const Case& c, const char* what, double found, Wide expected, Wide bound) {
  if (std::fabs(Wide(found) - expected) <= bound) return;
  fail(c, what, found, static_cast<double>(expected));
}

// Half a unit of the format at x, and what arithmetic on numbers of the size `terms` loses.
Wide rounding(const Case& c, Wide x, Wide terms) {
  const Wide unit = std::max(std::fabs(x), Wide(std::ldexp(1.0, c.format.min_exponent)));
  return unit * std::ldexp(Wide(1), -c.format.digits) + 8 * terms * c.format.computed_epsilon;
}

struct Results {
  Results(const Case& c)
      : mean(c.problem.channels),
        variance(c.problem.channels),
        sum(c.problem.channels),
        product(c.problem.channels),
        z(c.problem.rows * c.problem.channels, c.format),
        dz(c.problem.rows * c.problem.channels, c.format),
        dy(c.problem.rows * c.problem.channels, c.format) {}

  bool same_bits(const Results& other) const {
    return mean == other.mean && variance == other.variance && sum == other.sum &&
           product == other.product && z.same_bits(other.z) && dz.same_bits(other.dz) &&
           dy.same_bits(other.dy);
  }

  std::vector<double> mean, variance, sum, product;
  Matrix z, dz, dy;
};

void check(const Case& c) {
  const int64_t rows = c.problem.rows, channels = c.problem.channels, count = rows * channels;
  Matrix y(count, c.format), residual(count, c.format), gradient(count, c.format);
  for (int64_t i = 0; i < count; ++i) {
    y.set(i, random_number() + c.shift);
    residual.set(i, random_number());
    gradient.set(i, random_number());
  }
  std::vector<double> center(channels), scale(channels), bias(channels), offset(channels);
  std::vector<double> slope(channels);
  for (int64_t j = 0; j < channels; ++j) {
    center[j] = random_number() + c.shift;
    scale[j] = random_number();
    bias[j] = random_number();
    offset[j] = random_number();
    slope[j] = random_number();
  }
  const ca3d::NormReluCoefficients numbers{center.data(), scale.data(), bias.data(), offset.data(),
                                           slope.data()};

  std::vector<Results> runs;
  for (const int threads : {1, 3}) {
    runs.emplace_back(c);
    Results& r = runs.back();
    for (int64_t i = 0; i < count; ++i) r.dz.set(i, gradient.get(i));
    ca3d::norm_relu_statistics(c.problem, y.data(), r.mean.data(), r.variance.data(), threads);
    ca3d::norm_relu_apply(c.problem, numbers, y.data(), c.with_more ? residual.data() : nullptr,
                          r.z.data(), threads);
    ca3d::norm_relu_reduce(c.problem, center.data(), y.data(), r.dz.data(),
                           c.with_more ? residual.data() : nullptr, r.sum.data(), r.product.data(),
                           threads);
    ca3d::norm_relu_backward(c.problem, numbers, y.data(), r.dz.data(), r.dy.data(), threads);
  }
  const Results& r = runs[0];
  if (!r.same_bits(runs[1])) fail(c, "a result of three threads", 1, 0);

  const Wide epsilon = c.format.computed_epsilon;
  for (int64_t j = 0; j < channels; ++j) {
    Wide total = 0, gradients = 0, products = 0, sizes = 0, magnitudes = 0;
    const auto x_of = [&](int64_t i) {
      const Wide v = y.get(i);
      return c.problem.relu && v < 0 ? Wide(0) : v;
    };
    for (int64_t i = j; i < count; i += channels) total += x_of(i);
    const Wide mean = total / rows;
    Wide squares = 0, largest = 0;
    for (int64_t i = j; i < count; i += channels) {
      const Wide x = x_of(i), old = gradient.get(i), d = r.dz.get(i);
      squares += (x - mean) * (x - mean);
      largest = std::max(largest, std::fabs(x - mean));
      const Wide wanted = old + (c.with_more ? Wide(residual.get(i)) : 0);
      require_near(c, "dz", r.dz.get(i), wanted, rounding(c, wanted, 1));
      const Wide distance = x - center[j];
      gradients += d;
      products += d * distance;
      magnitudes += std::fabs(d);
      sizes += std::fabs(d) * (std::fabs(distance) + std::fabs(Wide(center[j])));

      Wide z = distance * scale[j] + bias[j] + (c.with_more ? Wide(residual.get(i)) : 0);
      require_near(c, "z", r.z.get(i), z,
                   rounding(c, z,
                            2 + std::fabs(distance * scale[j]) +
                                (c.format.bytes == 8 ? std::fabs(Wide(center[j])) : 0)));
      Wide dy = (d - offset[j] - distance * slope[j]) * scale[j];
      if (c.problem.relu && y.get(i) <= 0) dy = 0;
      require_near(c, "dy", r.dy.get(i), dy, rounding(c, dy, 4 + std::fabs(Wide(center[j]))));
    }
    // Sums are of differences from a value near the mean; the mean itself is a double.
    const Wide of_mean = 0x1p-52 * std::fabs(mean);
    require_near(c, "mean", r.mean[j], mean, 8 * epsilon * largest + 4 * of_mean);
    require_near(c, "variance", r.variance[j], squares / rows,
                 (32 * epsilon * largest + 4 * of_mean) * largest);
    require_near(c, "sum", r.sum[j], gradients, 16 * epsilon * magnitudes);
    require_near(c, "product", r.product[j], products, 16 * epsilon * sizes);
  }
}

Case random_case(const Format& format) {
  const int64_t sizes[] = {1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 70, 96};
  Case c{};
  c.format = format;
  c.problem.dtype = format.dtype;
  c.problem.channels = sizes[random_below(12)];
  c.problem.rows = random_below(3) ? sizes[random_below(12)] : 1 + random_below(600);
  // Now and then enough for several tasks.
  if (random_below(16) == 0) c.problem.rows = 70000 / c.problem.channels + random_below(40);
  c.problem.relu = random_below(2);
  // A mean far above the deviation, as long as the format can tell the values apart.
  c.shift = format.bytes > 2 && random_below(3) == 0 ? 300 : 0;
  c.with_more = random_below(2);
  return c;
}

void check_constant_and_special(const Format& format) {
  Case c{};
  c.format = format;
  c.problem = {format.dtype, 37, 5, true};
  Matrix y(37 * 5, format);
  for (int64_t i = 0; i < 37 * 5; ++i) y.set(i, i % 5 == 1 ? -2.0 : i % 5 == 2 ? 0.5 : 100.0);
  y.set(5 * 20 + 3, std::nan(""));
  std::vector<double> mean(5), variance(5);
  ca3d::norm_relu_statistics(c.problem, y.data(), mean.data(), variance.data(), 1);
  const double expected[] = {100, 0, 0.5, 0, 100};
  for (int j = 0; j < 5; ++j) {
    if (j == 3) {
      if (!std::isnan(mean[j]) || !std::isnan(variance[j])) fail(c, "NaN's mean", mean[j], 0);
    } else if (mean[j] != expected[j] || variance[j] != 0) {
      fail(c, "a constant channel's mean", mean[j], expected[j]);
    }
  }
}

}  // namespace

// Usage: norm_relu_conv_parity [cases for each instruction set and type]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    for (const Format& format : {kFloat32, kFloat64, kFloat16, kBFloat16}) {
      random_state = 1;
      check_constant_and_special(format);
      for (int i = 0; i < cases; ++i) check(random_case(format));
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
