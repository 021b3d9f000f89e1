// Compares the attention kernels of every instruction set that this machine runs with a plain
// scalar implementation in double, over awkward shapes. Prints the instruction sets; fails with a
// message.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "local_attention/local_attention.h"
#include "numbers.h"

namespace {

using ca3d::Edge;
using ca3d::LocalAttentionProblem;
using ca3d::StridedRows;

// Gaps after rows and dimensions are below this; with 1 there are none, and rows may be aligned.
int64_t gaps = 3;

// A tensor with its dimensions in random order in memory and gaps between rows; the allocation ends
// with the last element, so that a sanitizer sees every access beyond it.
class Tensor {
 public:
  Tensor(const LocalAttentionProblem& p, const Format& format) : format_(format), p_(p) {
    const int64_t size[4] = {p.outer, p.inner, p.heads, p.frames};
    int order[4] = {0, 1, 2, 3};
    for (int i = 3; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
    int64_t step = p.head_dim + random_below(gaps);
    int64_t last = 0;
    for (const int i : order) {
      stride_[i] = step;
      last += (size[i] - 1) * step;
      step = step * size[i] + random_below(gaps);
    }
    memory_.resize((last + p.head_dim) * format.bytes);
    each([&](char* at) { write(at, std::nan(""), format_); });
  }

  StridedRows rows() { return {memory_.data(), stride_[0], stride_[1], stride_[2], stride_[3]}; }

  void randomize() {
    each([&](char* at) { write(at, random_number(), format_); });
  }

  // Element (outer, inner, head, frame, i).
  char* at(int64_t b, int64_t n, int64_t h, int64_t t, int64_t i) {
    const int64_t offset = b * stride_[0] + n * stride_[1] + h * stride_[2] + t * stride_[3] + i;
    return memory_.data() + offset * static_cast<int64_t>(format_.bytes);
  }

  double value(int64_t b, int64_t n, int64_t h, int64_t t, int64_t i) {
    return read(at(b, n, h, t, i), format_);
  }

  // Elements in logical order.
  std::vector<double> values() {
    std::vector<double> all;
    each([&](char* at) { all.push_back(read(at, format_)); });
    return all;
  }

 private:
  template <class Visit>
  void each(const Visit& visit) {
    for (int64_t b = 0; b < p_.outer; ++b)
      for (int64_t n = 0; n < p_.inner; ++n)
        for (int64_t h = 0; h < p_.heads; ++h)
          for (int64_t t = 0; t < p_.frames; ++t)
            for (int64_t i = 0; i < p_.head_dim; ++i) visit(at(b, n, h, t, i));
  }

  Format format_;
  LocalAttentionProblem p_;
  int64_t stride_[4];
  std::vector<char> memory_;
};

// ---- the definition ----

// Head and frame that slot n of (h, t) reads; frame -1 outside the clip.
struct Source {
  int64_t head, frame;
};

Source source(const LocalAttentionProblem& p, int64_t h, int64_t t, int64_t n) {
  const int64_t size = p.window.kernel_size, step = p.window.dilation;
  int64_t head = h, frame;
  if (p.key_table) {
    head = p.key_table[(h * size + n) * 2];
    n = p.key_table[(h * size + n) * 2 + 1];
  }
  if (p.window.causal) {
    frame = t - (size - 1 - n) * step;
  } else if (p.window.edge == Edge::kShift) {
    int64_t before = 0, after = 0;  // frames of t's dilation class on either side
    while (t - (before + 1) * step >= 0) ++before;
    while (t + (after + 1) * step < p.frames) ++after;
    int64_t first = -(size / 2);
    first = std::min(first, after - size + 1);
    first = std::max(first, -before);
    frame = t + (first + n) * step;
  } else {
    frame = t + (n - size / 2) * step;
  }
  return {head, frame >= 0 && frame < p.frames ? frame : -1};
}

struct Expected {
  std::vector<double> o, dq, dk, dv;
};

Expected definition(const LocalAttentionProblem& p, Tensor& q, Tensor& k, Tensor& v, Tensor& go) {
  const int64_t dim = p.head_dim, size = p.window.kernel_size;
  const int64_t item = p.heads * p.frames * dim, all = p.outer * p.inner * item;
  Expected e{std::vector<double>(all), std::vector<double>(all), std::vector<double>(all),
             std::vector<double>(all)};
  const auto index = [&](int64_t b, int64_t n, int64_t h, int64_t t) {
    return (b * p.inner + n) * item + (h * p.frames + t) * dim;
  };
  for (int64_t b = 0; b < p.outer; ++b) {
    for (int64_t n = 0; n < p.inner; ++n) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t t = 0; t < p.frames; ++t) {
          std::vector<double> weight(size), gradient(size);
          double total = 0, mean = 0;
          for (int64_t j = 0; j < size; ++j) {
            const Source s = source(p, h, t, j);
            double dot = 0;
            for (int64_t i = 0; s.frame >= 0 && i < dim; ++i) {
              dot += q.value(b, n, h, t, i) * k.value(b, n, s.head, s.frame, i);
              gradient[j] += go.value(b, n, h, t, i) * v.value(b, n, s.head, s.frame, i);
            }
            const bool counts = s.frame >= 0 || p.window.edge == Edge::kZero;
            weight[j] = counts ? std::exp(dot * p.scale) : 0;
            total += weight[j];
          }
          for (double& w : weight) w /= total;
          for (int64_t j = 0; j < size; ++j) mean += weight[j] * gradient[j];
          for (int64_t j = 0; j < size; ++j) {
            const Source s = source(p, h, t, j);
            if (s.frame < 0) continue;
            const double d = weight[j] * (gradient[j] - mean) * p.scale;
            const int64_t query = index(b, n, h, t), key = index(b, n, s.head, s.frame);
            for (int64_t i = 0; i < dim; ++i) {
              e.o[query + i] += weight[j] * v.value(b, n, s.head, s.frame, i);
              e.dq[query + i] += d * k.value(b, n, s.head, s.frame, i);
              e.dk[key + i] += d * q.value(b, n, h, t, i);
              e.dv[key + i] += weight[j] * go.value(b, n, h, t, i);
            }
          }
        }
      }
    }
  }
  return e;
}

// ---- the comparison ----

[[noreturn]] void fail(const LocalAttentionProblem& p, const Format& format, const char* what,
                       double error, double allowed) {
  std::printf(
      "FAILED %s %s %s: error %g, allowed %g; outer %d inner %d heads %d frames %d "
      "head_dim %d kernel_size %d dilation %d causal %d edge %d key_table %d\n",
      ca3d::isa_name(ca3d::current_isa()), format.name, what, error, allowed,
      static_cast<int>(p.outer), static_cast<int>(p.inner), static_cast<int>(p.heads),
      static_cast<int>(p.frames), static_cast<int>(p.head_dim),
      static_cast<int>(p.window.kernel_size), static_cast<int>(p.window.dilation), p.window.causal,
      static_cast<int>(p.window.edge), p.key_table != nullptr);
  std::exit(1);
}

void compare(const LocalAttentionProblem& p, const Format& format, const char* what,
             const std::vector<double>& ours, const std::vector<double>& expected) {
  double largest = 0, error = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
    const double difference = std::fabs(ours[i] - expected[i]);
    if (!(difference <= error)) error = difference;  // a NaN counts, and stays
  }
  // Rounding to storage, and the roundings of sums whose terms are of the order of 1.
  const double allowed = std::ldexp(largest, 1 - format.digits) +
                         64 * format.computed_epsilon * std::max(largest, 1.0) +
                         std::ldexp(1.0, format.min_exponent - format.digits);
  if (!(error <= allowed)) fail(p, format, what, error, allowed);
}

void check(const LocalAttentionProblem& p, const Format& format) {
  gaps = random_below(2) ? 1 : 3;
  Tensor q(p, format), k(p, format), v(p, format), go(p, format);
  for (Tensor* x : {&q, &k, &v, &go}) x->randomize();
  const Expected expected = definition(p, q, k, v, go);
  std::vector<double> first;
  for (const int threads : {1, 3}) {
    Tensor o(p, format), dq(p, format), dk(p, format), dv(p, format);
    ca3d::local_attention_forward(p, q.rows(), k.rows(), v.rows(), o.rows(), threads);
    ca3d::local_attention_backward(p, q.rows(), k.rows(), v.rows(), go.rows(), dq.rows(), dk.rows(),
                                   dv.rows(), threads);
    compare(p, format, "o", o.values(), expected.o);
    compare(p, format, "dq", dq.values(), expected.dq);
    compare(p, format, "dk", dk.values(), expected.dk);
    compare(p, format, "dv", dv.values(), expected.dv);
    std::vector<double> all;
    for (Tensor* x : {&o, &dq, &dk, &dv}) {
      const std::vector<double> values = x->values();
      all.insert(all.end(), values.begin(), values.end());
    }
    if (threads == 1) first = all;
    if (all != first) fail(p, format, "equality over threads", 1, 0);
  }
}

LocalAttentionProblem random_problem(const Format& format, std::vector<int64_t>& table) {
  const int64_t frames[] = {1, 2, 3, 4, 5, 8, 11, 16, 17, 33, 70};
  const int64_t dims[] = {1, 2, 3, 7, 8, 12, 16, 20, 32, 33, 64, 64, 65, 100, 128};
  LocalAttentionProblem p{};
  p.dtype = format.dtype;
  p.outer = 1 + random_below(2);
  p.inner = 1 + random_below(3);
  p.heads = 1 + random_below(5);
  p.frames = frames[random_below(11)];
  p.head_dim = dims[random_below(15)];
  p.window.kernel_size = 1 + random_below(random_below(4) ? 6 : 40);
  p.window.dilation = random_below(2) ? 1 : 1 + random_below(6);
  p.window.causal = random_below(3) == 0;
  p.window.edge = static_cast<Edge>(random_below(3));
  p.scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
  if (p.window.edge == Edge::kZero && !p.window.causal && p.window.dilation == 1 &&
      p.window.kernel_size <= 12 && random_below(2)) {
    table.clear();
    for (int64_t i = 0; i < p.heads * p.window.kernel_size; ++i) {
      table.push_back(random_below(p.heads));
      table.push_back(random_below(p.window.kernel_size));
    }
    p.key_table = table.data();
  }
  return p;
}

}  // namespace

// Usage: attention_parity [cases for each instruction set and type]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    std::vector<int64_t> table;
    for (const Format& format : {kFloat32, kFloat64, kFloat16, kBFloat16}) {
      random_state = 1;
      for (int i = 0; i < cases; ++i) check(random_problem(format, table), format);
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
