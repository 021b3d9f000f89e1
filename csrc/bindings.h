// What Python passes, as the kernels want it. Shared by the modules of CPU and CUDA kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/strided.h"
#include "local_attention/local_attention.h"
#include "preparam_step/preparam_step.h"

namespace py = pybind11;

namespace ca3d {

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype '" + name +
                              "' is not supported; allowed: float32, float64, float16, bfloat16");
}

// (address, stride of outer, inner, head, frame), strides in elements.
inline StridedRows parse_rows(const std::array<int64_t, 5>& rows) {
  return {reinterpret_cast<void*>(rows[0]), rows[1], rows[2], rows[3], rows[4]};
}

// sizes is (outer, inner, heads, frames, head_dim), window (kernel_size, dilation, causal, edge).
inline LocalAttentionProblem parse_attention(const std::string& dtype,
                                             const std::array<int64_t, 5>& sizes,
                                             const std::array<int64_t, 4>& window, double scale,
                                             const std::vector<int64_t>& key_table) {
  if (window[2] != 0 && window[2] != 1) {
    throw std::invalid_argument("causal must be 0 or 1, got " + std::to_string(window[2]));
  }
  if (window[3] < 0 || window[3] > 2) {
    throw std::invalid_argument("edge must be 0 (truncate), 1 (zero) or 2 (shift), got " +
                                std::to_string(window[3]));
  }
  const size_t expected = static_cast<size_t>(sizes[2]) * static_cast<size_t>(window[0]) * 2;
  if (!key_table.empty() && key_table.size() != expected) {
    throw std::invalid_argument("key_table must have heads * kernel_size * 2 entries, got " +
                                std::to_string(key_table.size()));
  }
  return {parse_dtype(dtype),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          {window[0], window[1], window[2] == 1, static_cast<Edge>(window[3])},
          scale,
          key_table.empty() ? nullptr : key_table.data()};
}

// One row (param, grad, pre_param, momentum, compensation, count, number) a tensor: five addresses,
// 0 for no momentum or compensation.
using PreParamTable = py::array_t<int64_t, py::array::c_style>;

inline std::vector<PreParamRun> parse_runs(const PreParamTable& table) {
  if (table.ndim() != 1 || table.size() % 7 != 0) {
    throw std::invalid_argument("table must be flat, with 7 numbers a tensor");
  }
  std::vector<PreParamRun> runs;
  for (const int64_t *row = table.data(), *end = row + table.size(); row != end; row += 7) {
    runs.push_back({reinterpret_cast<void*>(row[0]), reinterpret_cast<const void*>(row[1]),
                    reinterpret_cast<void*>(row[2]), reinterpret_cast<void*>(row[3]),
                    reinterpret_cast<void*>(row[4]), row[5], static_cast<uint32_t>(row[6])});
  }
  return runs;
}

inline Rounding parse_rounding(const std::string& name) {
  if (name == "nearest") return Rounding::kNearest;
  if (name == "stochastic") return Rounding::kStochastic;
  if (name == "compensated") return Rounding::kCompensated;
  throw std::invalid_argument("rounding '" + name +
                              "' is not supported; allowed: nearest, stochastic, compensated");
}

// Seed and number of the step, for stochastic rounding.
using Random = std::array<uint64_t, 2>;

// hyper is (lr, momentum, dampening, weight_decay, scale, gradient_scale).
inline PreParamStep parse_step(const std::string& param, const std::string& pre_param,
                               const std::array<double, 6>& hyper, bool nesterov,
                               const std::string& rounding, const Random& random) {
  return {parse_dtype(param), parse_dtype(pre_param),
          hyper[0],           hyper[1],
          hyper[2],           hyper[3],
          hyper[4],           hyper[5],
          nesterov,           parse_rounding(rounding),
          random[0],          static_cast<uint32_t>(random[1])};
}

}  // namespace ca3d
