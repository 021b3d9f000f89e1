// Compares the folded temporal half, of every instruction set that this machine runs, with its
// definition in temporal_block.h, computed in double. Prints the instruction sets; fails with a
// message.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "numbers.h"
#include "temporal_block/temporal_block.h"

namespace {

using Numbers = std::vector<double>;

// Elements as they are stored, in an allocation that ends with the last one.
struct Stored {
  Stored(int64_t count, const Format& format, double spread = 1)
      : format(format), bytes(count * format.bytes) {
    for (int64_t i = 0; i < count; ++i) {
      write(bytes.data() + i * format.bytes, random_number() * spread, format);
    }
  }

  const void* data() const { return bytes.data(); }
  double operator[](int64_t i) const { return read(bytes.data() + i * format.bytes, format); }

  Format format;
  std::vector<char> bytes;
};

[[noreturn]] void fail(const Format& format, const char* what, double found, double expected,
                       const ca3d::LocalAttentionProblem& p) {
  std::printf("FAILED %s %s: %s is %.9g, expected %.9g; frames %d heads %d head_dim %d table %d\n",
              ca3d::isa_name(ca3d::current_isa()), format.name, what, found, expected,
              static_cast<int>(p.frames), static_cast<int>(p.heads), static_cast<int>(p.head_dim),
              p.key_table != nullptr);
  std::exit(1);
}

struct Weights {
  Weights(const Format& f, int64_t heads, int64_t dim, int64_t frames, int64_t convolutions)
      : qkv_weight(heads * dim * 3 * dim, f, 1 / std::sqrt(double(dim))),
        qkv_bias(heads * frames * 3 * dim, f),
        norm_scale(heads * dim, f),
        norm_shift(heads * frames * dim, f),
        column_weight(convolutions * heads * 3 * dim * dim, f, 1 / std::sqrt(3.0 * dim)),
        column_bias(convolutions * heads * dim, f),
        column_scale(convolutions * heads * dim, f),
        column_shift(convolutions * heads * dim, f) {}

  Stored qkv_weight, qkv_bias, norm_scale, norm_shift;
  Stored column_weight, column_bias, column_scale, column_shift;
};

// The frames and heads that each slot of a query shows; slots beyond the clip have frame -1.
struct Slot {
  int64_t head, frame;
};

std::vector<Slot> slots_of(const ca3d::LocalAttentionProblem& p, int64_t head, int64_t t) {
  std::vector<Slot> slots;
  const ca3d::Window& w = p.window;
  if (p.key_table) {
    for (int64_t n = 0; n < w.kernel_size; ++n) {
      const int64_t* source = p.key_table + (head * w.kernel_size + n) * 2;
      const int64_t frame = t + source[1] - w.kernel_size / 2;
      slots.push_back({source[0], frame < 0 || frame >= p.frames ? -1 : frame});
    }
    return slots;
  }
  const ca3d::VisibleFrames seen = ca3d::visible_frames(w, p.frames, t);
  for (int64_t i = 0; i < seen.count; ++i) slots.push_back({head, seen.first + i * w.dilation});
  if (w.edge == ca3d::Edge::kZero) slots.resize(w.kernel_size, Slot{head, -1});
  return slots;
}

// scale relu(conv(y) + bias) + shift of one head, (frames, dim).
Numbers step(const Numbers& y, const Weights& w, int64_t at, int64_t frames, int64_t dim) {
  Numbers z(frames * dim);
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t o = 0; o < dim; ++o) {
      double sum = w.column_bias[at * dim + o];
      for (int64_t tap = 0; tap < 3; ++tap) {
        const int64_t s = t + tap - 1;
        if (s < 0 || s >= frames) continue;
        for (int64_t i = 0; i < dim; ++i) {
          sum += y[s * dim + i] * w.column_weight[((at * 3 + tap) * dim + i) * dim + o];
        }
      }
      z[t * dim + o] =
          std::max(sum, 0.0) * w.column_scale[at * dim + o] + w.column_shift[at * dim + o];
    }
  }
  return z;
}

void check(const Format& format) {
  const int64_t dims[] = {1, 3, 8, 16, 20, 32, 48, 64, 80};
  const int64_t frame_counts[] = {1, 2, 3, 4, 7, 8, 9};
  ca3d::LocalAttentionProblem p{};
  p.dtype = format.dtype;
  p.outer = 1 + random_below(2);
  p.inner = 1 + random_below(4);
  if (random_below(8) == 0) p.inner = 40;  // several tasks
  p.heads = 1 + random_below(3);
  p.frames = frame_counts[random_below(7)];
  p.head_dim = dims[random_below(9)];
  p.scale = random_number();
  std::vector<int64_t> table;
  if (random_below(3) == 0) {
    p.window = {1 + random_below(5), 1, false, ca3d::Edge::kZero};
    for (int64_t i = 0; i < p.heads * p.window.kernel_size; ++i) {
      table.push_back(random_below(p.heads));
      table.push_back(random_below(p.window.kernel_size));
    }
    p.key_table = table.data();
  } else {
    p.window = {1 + random_below(6), 1 + random_below(2), random_below(2) == 1,
                static_cast<ca3d::Edge>(random_below(3))};
  }
  const ca3d::TemporalBlockProblem problem{p, 2 * random_below(3)};
  const int64_t dim = p.head_dim, channels = p.heads * dim, frames = p.frames;
  const int64_t count = p.outer * frames * p.inner * channels;
  const Weights w(format, p.heads, dim, frames, problem.convolutions);
  const Stored x(count, format);
  std::vector<float> filters(ca3d::temporal_block_filter_count(problem));
  ca3d::temporal_block_filters(problem, w.column_weight.data(), filters.data(), 2);
  const ca3d::TemporalBlockWeights weights{
      w.qkv_weight.data(), w.qkv_bias.data(),    w.norm_scale.data(),   w.norm_shift.data(),
      filters.data(),      w.column_bias.data(), w.column_scale.data(), w.column_shift.data()};
  const auto clip = [&](const Stored& s) {
    return ca3d::TemporalBlockClip{const_cast<char*>(s.bytes.data()), frames * p.inner * channels,
                                   p.inner * channels, channels};
  };
  const Stored out(count, format), again(count, format);
  ca3d::temporal_block(problem, weights, clip(x), clip(out), 1);
  ca3d::temporal_block(problem, weights, clip(x), clip(again), 3);
  if (out.bytes != again.bytes) fail(format, "a result of three threads", 1, 0, p);

  for (int64_t pixel = 0; pixel < p.outer * p.inner; ++pixel) {
    const int64_t start = (pixel / p.inner * frames * p.inner + pixel % p.inner) * channels;
    const auto at = [&](int64_t t, int64_t c) { return start + t * p.inner * channels + c; };
    // (heads, frames, 3 dim)
    Numbers qkv(p.heads * frames * 3 * dim);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t t = 0; t < frames; ++t) {
        for (int64_t o = 0; o < 3 * dim; ++o) {
          double sum = w.qkv_bias[(h * frames + t) * 3 * dim + o];
          for (int64_t i = 0; i < dim; ++i) {
            sum += x[at(t, h * dim + i)] * w.qkv_weight[(h * dim + i) * 3 * dim + o];
          }
          qkv[(h * frames + t) * 3 * dim + o] = sum;
        }
      }
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      Numbers y(frames * dim);
      for (int64_t t = 0; t < frames; ++t) {
        const std::vector<Slot> slots = slots_of(p, h, t);
        const double* q = qkv.data() + (h * frames + t) * 3 * dim;
        Numbers logits;
        double largest = -HUGE_VAL, total = 0;
        for (const Slot& slot : slots) {
          double sum = 0;
          for (int64_t i = 0; slot.frame >= 0 && i < dim; ++i) {
            sum += q[i] * qkv[((slot.head * frames + slot.frame) * 3 + 1) * dim + i];
          }
          logits.push_back(p.scale * sum);
          largest = std::max(largest, logits.back());
        }
        for (double& logit : logits) total += logit = std::exp(logit - largest);
        for (int64_t i = 0; i < dim; ++i) {
          double sum = x[at(t, h * dim + i)];
          for (std::size_t n = 0; n < slots.size(); ++n) {
            if (slots[n].frame < 0) continue;
            const int64_t row = slots[n].head * frames + slots[n].frame;
            sum += logits[n] / total * qkv[(row * 3 + 2) * dim + i];
          }
          y[t * dim + i] =
              sum * w.norm_scale[h * dim + i] + w.norm_shift[(h * frames + t) * dim + i];
        }
      }
      for (int64_t i = 0; i < problem.convolutions; i += 2) {
        const Numbers u = step(y, w, i * p.heads + h, frames, dim);
        const Numbers more = step(u, w, (i + 1) * p.heads + h, frames, dim);
        for (std::size_t n = 0; n < y.size(); ++n) y[n] += more[n];
      }
      for (int64_t t = 0; t < frames; ++t) {
        for (int64_t i = 0; i < dim; ++i) {
          const double expected = y[t * dim + i], found = out[at(t, h * dim + i)];
          const double unit = std::max(std::fabs(expected), std::ldexp(1.0, format.min_exponent));
          const double bound =
              unit * std::ldexp(1.0, -format.digits) + 2048 * format.computed_epsilon;
          if (!(std::fabs(found - expected) <= bound)) fail(format, "out", found, expected, p);
        }
      }
    }
  }
}

}  // namespace

// Usage: temporal_block_parity [cases for each instruction set and type]
int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (const std::string& isa : ca3d::supported_isas()) {
    ca3d::set_isa(isa);
    for (const Format& format : {kFloat32, kFloat16, kBFloat16}) {
      random_state = 1;
      for (int i = 0; i < cases; ++i) check(format);
    }
    std::printf("%s ok\n", isa.c_str());
  }
  return 0;
}
