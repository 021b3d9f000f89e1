// Checks a problem, cuts its matrix into tasks and hands them to the kernels of the instruction set
// in use.
#include "norm_relu_conv/norm_relu_conv.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/threading.h"

namespace ca3d {
namespace {

// A team of threads costs more than it saves on fewer elements.
constexpr int64_t kWorthThreads = 32768;
// Folded rows are a multiple of this: of the lanes of every instruction set.
constexpr int64_t kMostLanes = 16;
constexpr int64_t kMostTasks = 128;

const NormReluKernels& kernels() {
  switch (current_isa()) {
#ifdef CA3D_HAVE_avx512
    case Isa::kAvx512:
      return avx512::norm_relu_kernels;
#endif
#ifdef CA3D_HAVE_avx2
    case Isa::kAvx2:
      return avx2::norm_relu_kernels;
#endif
#ifdef CA3D_HAVE_neon
    case Isa::kNeon:
      return neon::norm_relu_kernels;
#endif
    default:
      return baseline::norm_relu_kernels;
  }
}

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

void require(bool condition, const char* name, int64_t value, const char* allowed) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                              std::to_string(value));
}

void check(const NormReluProblem& problem, int threads) {
  require(problem.rows >= 1, "rows", problem.rows, "at least 1");
  require(problem.channels >= 1, "channels", problem.channels, "at least 1");
  require(threads >= 1, "threads", threads, "at least 1");
}

// The matrix as the kernels see it: `fold` rows side by side, and the few rows that are left over
// as one shorter row.
class Folded {
 public:
  Folded(const NormReluProblem& problem, int threads) : problem_(problem) {
    check(problem, threads);
    fold = kMostLanes / std::gcd(problem.channels, kMostLanes);
    fold = std::min(fold, problem.rows);
    width = fold * problem.channels;
    rows = problem.rows / fold;
    left = problem.rows % fold;
    const int64_t elements = problem.rows * problem.channels;
    team = elements < kWorthThreads ? 1 : threads;
    // Of the size alone: the order of additions must not depend on the number of threads. Partial
    // sums of a task are a small part of what it reads.
    tasks = std::min(elements / std::max(kWorthThreads, 64 * width), std::min(kMostTasks, rows));
    tasks = std::max(tasks, int64_t{1});
  }

  // Calls run(task, start, first): `start` is the first element of the task's rows and `first` the
  // index of its results. Tasks 0 to `tasks` - 1 are of folded rows, task `tasks` is what is left.
  template <class Run>
  void for_tasks(const Run& run) const {
    parallel_ranges(tasks, team, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run(NormReluTask{problem_.dtype, problem_.relu, rows_of(i), width}, first_row(i) * width,
            i);
      }
    });
    if (left > 0) run(rest(), rows * width, tasks);
  }

  // Calls run(task, start) for stretches of rows whose results don't meet.
  template <class Run>
  void for_rows(const Run& run) const {
    parallel_ranges(rows, team, [&](int, int64_t begin, int64_t end) {
      if (begin == end) return;
      run(NormReluTask{problem_.dtype, problem_.relu, end - begin, width}, begin * width);
    });
    if (left > 0) run(rest(), rows * width);
  }

  int64_t rows_of(int64_t task) const { return first_row(task + 1) - first_row(task); }

  // Address of an element; null stays null.
  template <class Pointer>
  Pointer at(Pointer data, int64_t element) const {
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return data ? static_cast<Byte*>(data) + element * element_size(problem_.dtype) : nullptr;
  }

  int64_t fold, width, rows, left, tasks;
  int team;

 private:
  int64_t first_row(int64_t task) const { return rows * task / tasks; }
  NormReluTask rest() const { return {problem_.dtype, problem_.relu, 1, left * problem_.channels}; }

  NormReluProblem problem_;
};

// A coefficient of every column of a folded row, in the type that is computed in.
class Columns {
 public:
  Columns(const NormReluProblem& problem, const Folded& folded, const double* of_channels) {
    if (problem.dtype == DType::kFloat64) {
      fill(wide_, problem.channels, folded.width, of_channels);
    } else {
      fill(single_, problem.channels, folded.width, of_channels);
    }
  }
  const void* data() const {
    return wide_.empty() ? static_cast<const void*>(single_.data()) : wide_.data();
  }

 private:
  template <class Real>
  static void fill(std::vector<Real>& to, int64_t channels, int64_t width, const double* from) {
    to.resize(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<Real>(from[i % channels]);
  }

  std::vector<float> single_;
  std::vector<double> wide_;
};

// What a mean loses when it is rounded to the type that is computed in. It is the same for all
// values of a channel, so that a coefficient of the channel can make up for it.
double lost(const NormReluProblem& problem, double mean) {
  return problem.dtype == DType::kFloat64 ? 0 : mean - static_cast<float>(mean);
}

// Two numbers of every column of every task.
struct Partial {
  explicit Partial(const Folded& folded)
      : width(folded.width),
        first(static_cast<size_t>((folded.tasks + 1) * folded.width)),
        second(first.size()) {}

  int64_t width;
  std::vector<double> first, second;
};

// Calls add(rows, first, second) for the results of each row within the folded rows of each task,
// in a fixed order.
template <class Add>
void combine(const NormReluProblem& problem, const Folded& folded, const Partial& partial,
             const Add& add) {
  for (int64_t task = 0; task <= folded.tasks; ++task) {
    const bool rest = task == folded.tasks;
    const int64_t side_by_side = rest ? folded.left : folded.fold;
    for (int64_t i = 0; i < side_by_side; ++i) {
      const int64_t at = task * partial.width + i * problem.channels;
      add(rest ? 1 : folded.rows_of(task), partial.first.data() + at, partial.second.data() + at);
    }
  }
}

}  // namespace

void norm_relu_statistics(const NormReluProblem& problem, const void* y, double* mean,
                          double* variance, int threads) {
  const Folded folded(problem, threads);
  Partial partial(folded);
  const NormReluKernels& run = kernels();
  folded.for_tasks([&](const NormReluTask& task, int64_t start, int64_t first) {
    run.statistics(task, folded.at(y, start), partial.first.data() + first * partial.width,
                   partial.second.data() + first * partial.width);
  });
  std::fill_n(mean, problem.channels, 0.0);
  std::fill_n(variance, problem.channels, 0.0);
  int64_t before = 0;
  combine(problem, folded, partial, [&](int64_t rows, const double* means, const double* squares) {
    const double share = double(rows) / double(before + rows);
    for (int64_t c = 0; c < problem.channels; ++c) {
      const double delta = means[c] - mean[c];
      mean[c] += delta * share;
      variance[c] += squares[c] + delta * delta * double(before) * share;
    }
    before += rows;
  });
  for (int64_t c = 0; c < problem.channels; ++c) variance[c] /= double(problem.rows);
}

void norm_relu_apply(const NormReluProblem& problem, const NormReluCoefficients& coefficients,
                     const void* y, const void* residual, void* z, int threads) {
  const Folded folded(problem, threads);
  const Columns mean(problem, folded, coefficients.mean);
  const Columns scale(problem, folded, coefficients.scale);
  std::vector<double> corrected(coefficients.bias, coefficients.bias + problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) {
    corrected[c] -= lost(problem, coefficients.mean[c]) * coefficients.scale[c];
  }
  const Columns bias(problem, folded, corrected.data());
  const NormReluKernels& run = kernels();
  folded.for_rows([&](const NormReluTask& task, int64_t start) {
    run.apply(task, folded.at(y, start), folded.at(residual, start), mean.data(), scale.data(),
              bias.data(), folded.at(z, start));
  });
}

void norm_relu_reduce(const NormReluProblem& problem, const double* mean, const void* y, void* dz,
                      const void* more, double* sum, double* product, int threads) {
  const Folded folded(problem, threads);
  const Columns center(problem, folded, mean);
  Partial partial(folded);
  const NormReluKernels& run = kernels();
  folded.for_tasks([&](const NormReluTask& task, int64_t start, int64_t first) {
    run.reduce(task, folded.at(y, start), folded.at(dz, start), folded.at(more, start),
               center.data(), partial.first.data() + first * partial.width,
               partial.second.data() + first * partial.width);
  });
  std::fill_n(sum, problem.channels, 0.0);
  std::fill_n(product, problem.channels, 0.0);
  combine(problem, folded, partial, [&](int64_t, const double* sums, const double* products) {
    for (int64_t c = 0; c < problem.channels; ++c) {
      sum[c] += sums[c];
      product[c] += products[c];
    }
  });
  for (int64_t c = 0; c < problem.channels; ++c) product[c] -= lost(problem, mean[c]) * sum[c];
}

void norm_relu_backward(const NormReluProblem& problem, const NormReluCoefficients& coefficients,
                        const void* y, const void* dz, void* dy, int threads) {
  const Folded folded(problem, threads);
  const Columns mean(problem, folded, coefficients.mean);
  const Columns scale(problem, folded, coefficients.scale);
  std::vector<double> corrected(coefficients.offset, coefficients.offset + problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) {
    corrected[c] -= lost(problem, coefficients.mean[c]) * coefficients.slope[c];
  }
  const Columns offset(problem, folded, corrected.data());
  const Columns slope(problem, folded, coefficients.slope);
  const NormReluKernels& run = kernels();
  folded.for_rows([&](const NormReluTask& task, int64_t start) {
    run.backward(task, folded.at(y, start), folded.at(dz, start), mean.data(), scale.data(),
                 offset.data(), slope.data(), folded.at(dy, start));
  });
}

namespace {

double inverse_deviation(const NormReluAffine& affine, double variance) {
  return 1 / std::sqrt(variance + affine.eps);
}

std::vector<double> scales(const NormReluProblem& problem, const NormReluAffine& affine,
                           const double* variance) {
  std::vector<double> scale(static_cast<size_t>(problem.channels));
  for (int64_t c = 0; c < problem.channels; ++c) {
    scale[c] = affine.weight[c] * inverse_deviation(affine, variance[c]);
  }
  return scale;
}

void apply_affine(const NormReluProblem& problem, const NormReluAffine& affine, const double* mean,
                  const double* variance, const void* y, const void* residual, void* z,
                  int threads) {
  const std::vector<double> scale = scales(problem, affine, variance);
  norm_relu_apply(problem, {mean, scale.data(), affine.bias, nullptr, nullptr}, y, residual, z,
                  threads);
}

}  // namespace

void normalise(const NormReluProblem& problem, const NormReluAffine& affine, const void* y,
               const void* residual, double* mean, double* variance, void* z, int threads) {
  norm_relu_statistics(problem, y, mean, variance, threads);
  apply_affine(problem, affine, mean, variance, y, residual, z, threads);
}

void normalise_again(const NormReluProblem& problem, const NormReluAffine& affine,
                     const double* mean, const double* variance, const void* y, void* z,
                     int threads) {
  check(problem, threads);
  apply_affine(problem, affine, mean, variance, y, nullptr, z, threads);
}

void normalise_backward(const NormReluProblem& problem, const NormReluAffine& affine,
                        const double* mean, const double* variance, const void* y, void* dz,
                        const void* more, void* dy, double* dweight, double* dbias, int threads) {
  norm_relu_reduce(problem, mean, y, dz, more, dbias, dweight, threads);
  if (dy != nullptr) {
    const std::vector<double> scale = scales(problem, affine, variance);
    std::vector<double> offset(scale.size()), slope(scale.size());
    const double rows = static_cast<double>(problem.rows);
    for (int64_t c = 0; c < problem.channels; ++c) {
      offset[c] = dbias[c] / rows;
      slope[c] = dweight[c] / (variance[c] + affine.eps) / rows;
    }
    norm_relu_backward(problem, {mean, scale.data(), nullptr, offset.data(), slope.data()}, y, dz,
                       dy, threads);
  }
  for (int64_t c = 0; c < problem.channels; ++c) {
    dweight[c] *= inverse_deviation(affine, variance[c]);
  }
}

}  // namespace ca3d
