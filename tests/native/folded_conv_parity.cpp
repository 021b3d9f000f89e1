// Compares the folded convolution, of every instruction set that this machine runs, with its
// definition in folded_conv.h, computed in double. Prints the instruction sets; fails with a
// message.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "folded_conv/folded_conv.h"
#include "numbers.h"

namespace {

// Elements as they are stored, in an allocation that ends with the last one.
struct Stored {
  Stored(int64_t count, const Format& format) : format(format), bytes(count * format.bytes) {}

  double get(int64_t i) const { return read(bytes.data() + i * format.bytes, format); }
  void set(int64_t i, double x) { write(bytes.data() + i * format.bytes, x, format); }

  Format format;
  std::vector<char> bytes;
};

[[noreturn]] void fail(const char* what, const Format& format, double found, double expected) {
  std::printf("FAILED %s %s: %s is %.9g, expected %.9g\n", ca3d::isa_name(ca3d::current_isa()),
              format.name, what, found, expected);
  std::exit(1);
}

void require_near(const char* what, const Format& format, double found, double expected,
                  double bound) {
  const double unit = std::max(std::fabs(expected), std::ldexp(1.0, format.min_exponent));
  if (std::fabs(found - expected) <= unit * std::ldexp(1.0, -format.digits) + bound) return;
  fail(what, format, found, expected);
}

void fill(Stored& x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x.set(i, random_number());
}

std::vector<float> random_row(int64_t count) {
  std::vector<float> row;
  for (int64_t i = 0; i < count; ++i) row.push_back(static_cast<float>(random_number()));
  return row;
}

// The filters of weights (groups * outputs, inputs, 3, 3), as folded_conv.h lays them out.
std::vector<float> filters_of(const std::vector<float>& weight, const ca3d::FoldedConvProblem& p) {
  const double two[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  const double four[6][3] = {{1, 0, 0},
                             {1 / 6., 1 / 6., 1 / 6.},
                             {1 / 6., -1 / 6., 1 / 6.},
                             {16 / 15., 8 / 15., 4 / 15.},
                             {1 / 30., -1 / 15., 2 / 15.},
                             {0, 0, 1}};
  const int64_t panel = ca3d::folded_conv_panel(p.outputs),
                panels = (p.outputs + panel - 1) / panel;
  std::vector<float> filters(p.groups * 24 * panels * p.inputs * panel);
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t point = 0; point < 24; ++point) {
      for (int64_t o = 0; o < p.outputs; ++o) {
        for (int64_t i = 0; i < p.inputs; ++i) {
          const float* w = weight.data() + ((g * p.outputs + o) * p.inputs + i) * 9;
          double sum = 0;
          for (int y = 0; y < 3; ++y) {
            for (int x = 0; x < 3; ++x)
              sum += two[point / 6][y] * four[point % 6][x] * w[3 * y + x];
          }
          const int64_t block = (g * 24 + point) * panels + o / panel;
          filters[(block * p.inputs + i) * panel + o % panel] = static_cast<float>(sum);
        }
      }
    }
  }
  return filters;
}

void check(const Format& format) {
  const int64_t sides[] = {1, 2, 3, 4, 5, 8, 9, 14}, channels[] = {16, 32, 48, 96, 128};
  ca3d::FoldedConvProblem p{};
  p.dtype = format.dtype;
  p.images = 1 + random_below(3);
  p.height = sides[random_below(8)];
  p.width = sides[random_below(8)];
  p.groups = 1 + random_below(2);
  p.inputs = channels[random_below(5)];
  p.outputs = channels[random_below(5)];
  const int64_t all_in = p.groups * p.inputs, all_out = p.groups * p.outputs;
  const int64_t pixels = p.images * p.height * p.width;
  Stored x(pixels * all_in, format), residual(pixels * all_out, format);
  fill(x, pixels * all_in);
  fill(residual, pixels * all_out);
  const std::vector<float> weight = random_row(all_out * p.inputs * 9), bias = random_row(all_out);
  const std::vector<float> scale = random_row(all_out), shift = random_row(all_out);
  const std::vector<float> factor = random_row(all_out), filters = filters_of(weight, p);
  const ca3d::FoldedConvAffine affine{bias.data(), scale.data(), shift.data(), factor.data()};
  const bool with_residual = random_below(2);
  const void* more = with_residual ? residual.bytes.data() : nullptr;

  Stored z(pixels * all_out, format), again(pixels * all_out, format);
  ca3d::folded_conv(p, filters.data(), affine, x.bytes.data(), more, z.bytes.data(), 1);
  ca3d::folded_conv(p, filters.data(), affine, x.bytes.data(), more, again.bytes.data(), 3);
  if (z.bytes != again.bytes) fail("a result of three threads", format, 1, 0);

  const double bound = 32 * format.computed_epsilon * 9 * static_cast<double>(p.inputs);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t image = pixel / (p.height * p.width), row = pixel / p.width % p.height;
    const int64_t column = pixel % p.width;
    for (int64_t o = 0; o < all_out; ++o) {
      double sum = bias[o];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t r = row + tap / 3 - 1, c = column + tap % 3 - 1;
        if (r < 0 || r >= p.height || c < 0 || c >= p.width) continue;
        const int64_t at = ((image * p.height + r) * p.width + c) * all_in;
        for (int64_t i = 0; i < p.inputs; ++i) {
          sum += x.get(at + o / p.outputs * p.inputs + i) * weight[(o * p.inputs + i) * 9 + tap];
        }
      }
      double expected = std::max(sum, 0.0) * scale[o] + shift[o];
      if (with_residual) expected += factor[o] * residual.get(pixel * all_out + o);
      require_near("z", format, z.get(pixel * all_out + o), expected, bound);
    }
  }
}

void check_epilogue(const Format& format) {
  const int64_t rows = 1 + random_below(9), channels = 1 + random_below(70);
  Stored y(rows * channels, format), residual(rows * channels, format);
  fill(y, rows * channels);
  fill(residual, rows * channels);
  const std::vector<float> bias = random_row(channels), scale = random_row(channels);
  const std::vector<float> shift = random_row(channels), factor = random_row(channels);
  const ca3d::FoldedConvAffine affine{bias.data(), scale.data(), shift.data(), factor.data()};
  const bool with_residual = random_below(2);
  Stored z = y;
  ca3d::folded_epilogue(format.dtype, rows, channels, affine, z.bytes.data(),
                        with_residual ? residual.bytes.data() : nullptr, z.bytes.data(), 2);
  for (int64_t i = 0; i < rows * channels; ++i) {
    const int64_t c = i % channels;
    double expected = std::max(y.get(i) + bias[c], 0.0) * scale[c] + shift[c];
    if (with_residual) expected += factor[c] * residual.get(i);
    require_near("epilogue", format, z.get(i), expected, 16 * format.computed_epsilon);
  }
}

}  // namespace

// Usage: folded_conv_parity [cases for each instruction set and type]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    for (const Format& format : {kFloat32, kFloat16, kBFloat16}) {
      random_state = 1;
      // A convolution is a hundred times the work of another op's case.
      for (int i = 0; i < cases; ++i) {
        if (i % 10 == 0) check(format);
        check_epilogue(format);
      }
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
