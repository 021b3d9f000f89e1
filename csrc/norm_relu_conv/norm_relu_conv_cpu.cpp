// CPU kernels of the passes around a convolution. Compiled once per instruction set.
#include "common/simd.h"
#include "norm_relu_conv/norm_relu_conv.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// Rows whose sums are held in the type that is computed in, before they go into doubles. What a
// mean is off by is the same for all values of a channel, and a convolution adds it up: sums of 128
// rows made a residual column's output several times less exact.
constexpr int64_t kChunk = 16;
// Vectors side by side whose sums stay in registers.
constexpr int kBlock = 4;

template <class Stored>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};

// How a vector's elements are reached: all of them, or the few at the end of a row.
struct Whole {
  template <class Real, class Stored>
  Vector<Real> read(const Stored* from) const {
    return load(from);
  }
  template <class Real, class Stored>
  void write(Stored* to, Vector<Real> x) const {
    store(to, x);
  }
  template <class Real>
  constexpr int elements() const {
    return kLanes<Real>;
  }
};

struct Part {
  template <class Real, class Stored>
  Vector<Real> read(const Stored* from) const {
    Stored values[kLanes<Real>] = {};
    __builtin_memcpy(values, from, count * sizeof(Stored));
    return load(values);
  }
  template <class Real, class Stored>
  void write(Stored* to, Vector<Real> x) const {
    Stored values[kLanes<Real>];
    store(values, x);
    __builtin_memcpy(to, values, count * sizeof(Stored));
  }
  template <class Real>
  int elements() const {
    return count;
  }

  int count;
};

template <class Stored, bool kRelu>
struct Kernel {
  using Real = typename Computed<Stored>::Type;
  using V = Vector<Real>;
  static constexpr int kCount = kLanes<Real>;

  // NaN passes, as in torch.
  static V rectified(V y) { return kRelu ? (y < 0 ? V{} : y) : y; }

  template <class To>
  static V as_stored(V x) {
    To values[kCount];
    store(values, x);
    return load(values);
  }

  // Calls use(column, vectors, access), `vectors` a compile-time number, for blocks of columns.
  template <class Use>
  static void for_columns(int64_t width, Use use) {
    int64_t column = 0;
    for (; column + kBlock * kCount <= width; column += kBlock * kCount) {
      use(column, Vectors<kBlock>{}, Whole{});
    }
    for (; column + kCount <= width; column += kCount) use(column, Vectors<1>{}, Whole{});
    if (column < width) use(column, Vectors<1>{}, Part{static_cast<int>(width - column)});
  }
  template <int kVectors>
  struct Vectors {};

  // ---- statistics ----

  // Merges a chunk of `rows` rows into the mean and the squares of the `before` rows above it
  // (zeros if there are none). The sums are of distances from a value near the mean: a large mean
  // costs no digits.
  template <int kVectors, class Access>
  static void statistics_chunk(const Stored* y, int64_t rows, int64_t width, int64_t before,
                               double* __restrict mean, double* __restrict squares, Access access) {
    V shift[kVectors] = {}, sum[kVectors] = {}, square[kVectors] = {};
    Real shifts[kVectors * kCount], sums[kVectors * kCount], sums_of_squares[kVectors * kCount];
    const int elements = (kVectors - 1) * kCount + access.template elements<Real>();
    for (int i = 0; i < elements; ++i) shifts[i] = static_cast<Real>(mean[i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      shift[v] = before == 0 ? rectified(access.template read<Real>(y + v * kCount))
                             : access.template read<Real>(shifts + v * kCount);
    }
    for (int64_t row = 0; row < rows; ++row, y += width) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V d = rectified(access.template read<Real>(y + v * kCount)) - shift[v];
        sum[v] += d;
        square[v] += d * d;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(shifts + v * kCount, shift[v]);
      store(sums + v * kCount, sum[v]);
      store(sums_of_squares + v * kCount, square[v]);
    }
    // The reciprocal of a whole chunk is exact.
    const double count = double(rows), reciprocal = 1 / count;
    const double share = count / double(before + rows), spread = double(before) * share;
    for (int i = 0; i < elements; ++i) {
      const double total = sums[i], distance = total * reciprocal;
      // Rounding may leave a difference below zero; NaN must stay.
      const double within = sums_of_squares[i] - total * distance;
      const double delta = (shifts[i] - mean[i]) + distance;
      mean[i] += delta * share;
      squares[i] += (within < 0 ? 0 : within) + delta * delta * spread;
    }
  }

  static void statistics(const NormReluTask& task, const void* data, double* mean,
                         double* squares) {
    const Stored* y = static_cast<const Stored*>(data);
    for (int64_t row = 0; row < task.rows; row += kChunk) {
      const int64_t rows = task.rows - row < kChunk ? task.rows - row : kChunk;
      for_columns(task.width, [&](int64_t column, auto vectors, auto access) {
        chunk_of(vectors, y + row * task.width + column, rows, task.width, row, mean + column,
                 squares + column, access);
      });
    }
  }
  template <int kVectors, class... Arguments>
  static void chunk_of(Vectors<kVectors>, Arguments... arguments) {
    statistics_chunk<kVectors>(arguments...);
  }

  // ---- apply ----

  static void apply(const NormReluTask& task, const void* from, const void* more, const void* means,
                    const void* scales, const void* biases, void* to) {
    const auto *y = static_cast<const Stored*>(from), *residual = static_cast<const Stored*>(more);
    const auto *mean = static_cast<const Real*>(means), *scale = static_cast<const Real*>(scales);
    const auto* bias = static_cast<const Real*>(biases);
    auto* z = static_cast<Stored*>(to);
    const auto one = [&](int64_t column, auto access) {
      V x = rectified(access.template read<Real>(y + column)) -
            access.template read<Real>(mean + column);
      x = x * access.template read<Real>(scale + column) +
          access.template read<Real>(bias + column);
      if (residual) x += access.template read<Real>(residual + column);
      access.template write<Real>(z + column, x);
    };
    for (int64_t row = 0; row < task.rows; ++row) {
      int64_t column = 0;
      for (; column + kCount <= task.width; column += kCount) one(column, Whole{});
      if (column < task.width) one(column, Part{static_cast<int>(task.width - column)});
      y += task.width;
      z += task.width;
      if (residual) residual += task.width;
    }
  }

  // ---- reduce ----

  template <int kVectors, class Access>
  static void reduce_chunk(Vectors<kVectors>, const Stored* y, Stored* dz, const Stored* more,
                           const Real* mean, int64_t rows, int64_t width, double* __restrict sum,
                           double* __restrict product, Access access) {
    V center[kVectors] = {}, sums[kVectors] = {}, products[kVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      center[v] = access.template read<Real>(mean + v * kCount);
    }
    for (int64_t row = 0; row < rows; ++row, y += width, dz += width) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V gradient = access.template read<Real>(dz + v * kCount);
        if (more) {
          gradient += access.template read<Real>(more + row * width + v * kCount);
          gradient = as_stored<Stored>(gradient);
          access.template write<Real>(dz + v * kCount, gradient);
        }
        const V x = rectified(access.template read<Real>(y + v * kCount));
        sums[v] += gradient;
        products[v] += gradient * (x - center[v]);
      }
    }
    Real sum_lanes[kVectors * kCount], product_lanes[kVectors * kCount];
    for (int v = 0; v < kVectors; ++v) {
      store(sum_lanes + v * kCount, sums[v]);
      store(product_lanes + v * kCount, products[v]);
    }
    const int elements = (kVectors - 1) * kCount + access.template elements<Real>();
    for (int i = 0; i < elements; ++i) {
      sum[i] += sum_lanes[i];
      product[i] += product_lanes[i];
    }
  }

  static void reduce(const NormReluTask& task, const void* from, void* gradient, const void* second,
                     const void* mean, double* sum, double* product) {
    const auto* y = static_cast<const Stored*>(from);
    auto* dz = static_cast<Stored*>(gradient);
    const auto* more = static_cast<const Stored*>(second);
    for (int64_t row = 0; row < task.rows; row += kChunk) {
      const int64_t rows = task.rows - row < kChunk ? task.rows - row : kChunk;
      for_columns(task.width, [&](int64_t column, auto vectors, auto access) {
        const int64_t at = row * task.width + column;
        reduce_chunk(vectors, y + at, dz + at, more ? more + at : nullptr,
                     static_cast<const Real*>(mean) + column, rows, task.width, sum + column,
                     product + column, access);
      });
    }
  }

  // ---- backward ----

  static void backward(const NormReluTask& task, const void* from, const void* gradient,
                       const void* mean, const void* scale, const void* offset, const void* slope,
                       void* to) {
    const auto *y = static_cast<const Stored*>(from), *dz = static_cast<const Stored*>(gradient);
    const auto *m = static_cast<const Real*>(mean), *a = static_cast<const Real*>(scale);
    const auto *k = static_cast<const Real*>(offset), *t = static_cast<const Real*>(slope);
    auto* dy = static_cast<Stored*>(to);
    const auto one = [&](int64_t column, auto access) {
      const V x = access.template read<Real>(y + column);
      const V distance = rectified(x) - access.template read<Real>(m + column);
      V d = access.template read<Real>(dz + column) - access.template read<Real>(k + column);
      d = (d - distance * access.template read<Real>(t + column)) *
          access.template read<Real>(a + column);
      if (kRelu) d = x <= 0 ? V{} : d;
      access.template write<Real>(dy + column, d);
    };
    for (int64_t row = 0; row < task.rows; ++row) {
      int64_t column = 0;
      for (; column + kCount <= task.width; column += kCount) one(column, Whole{});
      if (column < task.width) one(column, Part{static_cast<int>(task.width - column)});
      y += task.width;
      dz += task.width;
      dy += task.width;
    }
  }
};

// Calls use(Kernel<...>{}) with the kernel of the task's type.
template <bool kRelu, class Use>
void with_type(const NormReluTask& task, Use use) {
  switch (task.dtype) {
    case DType::kFloat16:
      return use(Kernel<Half, kRelu>{});
    case DType::kBFloat16:
      return use(Kernel<BFloat16, kRelu>{});
    case DType::kFloat64:
      return use(Kernel<double, kRelu>{});
    default:
      return use(Kernel<float, kRelu>{});
  }
}

template <class Use>
void with_kernel(const NormReluTask& task, Use use) {
  return task.relu ? with_type<true>(task, use) : with_type<false>(task, use);
}

void statistics(const NormReluTask& task, const void* y, double* mean, double* squares) {
  with_kernel(task, [&](auto kernel) { kernel.statistics(task, y, mean, squares); });
}

void apply(const NormReluTask& task, const void* y, const void* residual, const void* mean,
           const void* scale, const void* bias, void* z) {
  with_kernel(task, [&](auto kernel) { kernel.apply(task, y, residual, mean, scale, bias, z); });
}

void reduce(const NormReluTask& task, const void* y, void* dz, const void* more, const void* mean,
            double* sum, double* product) {
  with_kernel(task, [&](auto kernel) { kernel.reduce(task, y, dz, more, mean, sum, product); });
}

void backward(const NormReluTask& task, const void* y, const void* dz, const void* mean,
              const void* scale, const void* offset, const void* slope, void* dy) {
  with_kernel(task,
              [&](auto kernel) { kernel.backward(task, y, dz, mean, scale, offset, slope, dy); });
}

}  // namespace

const NormReluKernels norm_relu_kernels = {statistics, apply, reduce, backward};

}  // namespace CA3D_ISA
}  // namespace ca3d
