// Python module `_native`: raw pointers, sizes and strides in, kernels out. It knows no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/dispatch.h"
#include "common/dtype.h"
#include "common/pages.h"
#include "folded_conv/folded_conv.h"
#include "local_attention/local_attention.h"
#include "norm_relu_conv/norm_relu_conv.h"
#include "preparam_step/preparam_step.h"
#include "temporal_block/temporal_block.h"

using ca3d::parse_attention;
using ca3d::parse_dtype;
using ca3d::parse_rows;
using ca3d::parse_runs;
using ca3d::parse_step;
using ca3d::PreParamTable;

namespace {

void attention_forward(const std::string& dtype, const std::array<int64_t, 5>& sizes,
                       const std::array<int64_t, 4>& window, double scale,
                       const std::vector<int64_t>& key_table, const std::array<int64_t, 5>& q,
                       const std::array<int64_t, 5>& k, const std::array<int64_t, 5>& v,
                       const std::array<int64_t, 5>& o, int threads) {
  const auto problem = parse_attention(dtype, sizes, window, scale, key_table);
  const py::gil_scoped_release release;
  ca3d::local_attention_forward(problem, parse_rows(q), parse_rows(k), parse_rows(v), parse_rows(o),
                                threads);
}

void attention_backward(const std::string& dtype, const std::array<int64_t, 5>& sizes,
                        const std::array<int64_t, 4>& window, double scale,
                        const std::vector<int64_t>& key_table, const std::array<int64_t, 5>& q,
                        const std::array<int64_t, 5>& k, const std::array<int64_t, 5>& v,
                        const std::array<int64_t, 5>& go, const std::array<int64_t, 5>& dq,
                        const std::array<int64_t, 5>& dk, const std::array<int64_t, 5>& dv,
                        int threads) {
  const auto problem = parse_attention(dtype, sizes, window, scale, key_table);
  const py::gil_scoped_release release;
  ca3d::local_attention_backward(problem, parse_rows(q), parse_rows(k), parse_rows(v),
                                 parse_rows(go), parse_rows(dq), parse_rows(dk), parse_rows(dv),
                                 threads);
}

// Two numbers for each piece of kPreParamRun elements, run after run; none for unknown.
using PreParamLargest = py::array_t<double, py::array::c_style>;

ca3d::PreParamLargest<double>* parse_largest(const std::vector<ca3d::PreParamRun>& runs,
                                             std::optional<PreParamLargest>& largest) {
  if (!largest) return nullptr;
  int64_t pieces = 0;
  for (const ca3d::PreParamRun& run : runs) {
    pieces += (run.count + ca3d::kPreParamRun - 1) / ca3d::kPreParamRun;
  }
  if (largest->ndim() != 1 || largest->size() != 2 * pieces) {
    throw std::invalid_argument("largest must be flat, with 2 numbers for each of " +
                                std::to_string(pieces) + " pieces");
  }
  return reinterpret_cast<ca3d::PreParamLargest<double>*>(largest->mutable_data());
}

template <auto kFunction>
auto preparam(const PreParamTable& table, const std::string& param, const std::string& pre_param,
              const std::array<double, 6>& hyper, bool nesterov, const std::string& rounding,
              const ca3d::Random& random, int threads, std::optional<PreParamLargest> largest) {
  const ca3d::PreParamStep step = parse_step(param, pre_param, hyper, nesterov, rounding, random);
  const std::vector<ca3d::PreParamRun> runs = parse_runs(table);
  ca3d::PreParamLargest<double>* entries = parse_largest(runs, largest);
  const py::gil_scoped_release release;
  return kFunction(step, runs.data(), static_cast<int64_t>(runs.size()), threads, entries);
}

template <class Function>
void def_preparam(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::arg("table"), py::arg("param"), py::arg("pre_param"), py::arg("hyper"),
        py::arg("nesterov"), py::arg("rounding"), py::arg("random"), py::arg("threads"),
        py::arg("largest").noconvert() = py::none());
}

template <class Element>
Element* pointer(int64_t address) {
  return reinterpret_cast<Element*>(address);
}

// matrix is (rows, channels), affine (weight, bias), statistics (mean, variance). Every tensor is
// an address, 0 for none; what belongs to channels is in doubles.
void normalise(const std::string& dtype, const std::array<int64_t, 2>& matrix, bool relu,
               const std::array<int64_t, 2>& affine, double eps, int64_t y, int64_t residual,
               const std::array<int64_t, 2>& statistics, int64_t z, int threads) {
  const ca3d::NormReluProblem problem{parse_dtype(dtype), matrix[0], matrix[1], relu};
  const ca3d::NormReluAffine parsed{pointer<const double>(affine[0]),
                                    pointer<const double>(affine[1]), eps};
  const py::gil_scoped_release release;
  ca3d::normalise(problem, parsed, pointer<const void>(y), pointer<const void>(residual),
                  pointer<double>(statistics[0]), pointer<double>(statistics[1]), pointer<void>(z),
                  threads);
}

void normalise_again(const std::string& dtype, const std::array<int64_t, 2>& matrix, bool relu,
                     const std::array<int64_t, 2>& affine, double eps, int64_t y,
                     const std::array<int64_t, 2>& statistics, int64_t z, int threads) {
  const ca3d::NormReluProblem problem{parse_dtype(dtype), matrix[0], matrix[1], relu};
  const ca3d::NormReluAffine parsed{pointer<const double>(affine[0]),
                                    pointer<const double>(affine[1]), eps};
  const py::gil_scoped_release release;
  ca3d::normalise_again(problem, parsed, pointer<const double>(statistics[0]),
                        pointer<const double>(statistics[1]), pointer<const void>(y),
                        pointer<void>(z), threads);
}

// gradients is (dweight, dbias).
void normalise_backward(const std::string& dtype, const std::array<int64_t, 2>& matrix, bool relu,
                        const std::array<int64_t, 2>& affine, double eps, int64_t y,
                        const std::array<int64_t, 2>& statistics, int64_t dz, int64_t more,
                        int64_t dy, const std::array<int64_t, 2>& gradients, int threads) {
  const ca3d::NormReluProblem problem{parse_dtype(dtype), matrix[0], matrix[1], relu};
  const ca3d::NormReluAffine parsed{pointer<const double>(affine[0]),
                                    pointer<const double>(affine[1]), eps};
  const py::gil_scoped_release release;
  ca3d::normalise_backward(problem, parsed, pointer<const double>(statistics[0]),
                           pointer<const double>(statistics[1]), pointer<const void>(y),
                           pointer<void>(dz), pointer<const void>(more), pointer<void>(dy),
                           pointer<double>(gradients[0]), pointer<double>(gradients[1]), threads);
}

// What describes a problem of the temporal half: dtype, sizes, window, scale and key_table as for
// local attention, and the number of convolutions.
using TemporalBlockArguments =
    std::tuple<std::string, std::array<int64_t, 5>, std::array<int64_t, 4>, double,
               std::vector<int64_t>, int64_t>;

ca3d::TemporalBlockProblem parse_temporal_block(const TemporalBlockArguments& arguments) {
  const auto& [dtype, sizes, window, scale, key_table, convolutions] = arguments;
  return {parse_attention(dtype, sizes, window, scale, key_table), convolutions};
}

// Addresses of a column_weight and of `temporal_block_filter_count` floats.
void temporal_block_filters(const TemporalBlockArguments& arguments, int64_t column_weight,
                            int64_t filters, int threads) {
  const ca3d::TemporalBlockProblem problem = parse_temporal_block(arguments);
  const py::gil_scoped_release release;
  ca3d::temporal_block_filters(problem, pointer<const void>(column_weight), pointer<float>(filters),
                               threads);
}

// weights are the addresses of the fields of TemporalBlockWeights, x and out (address, stride of
// outer, frame, inner).
void temporal_block(const TemporalBlockArguments& arguments, const std::array<int64_t, 8>& weights,
                    const std::array<int64_t, 4>& x, const std::array<int64_t, 4>& out,
                    int threads) {
  const ca3d::TemporalBlockProblem problem = parse_temporal_block(arguments);
  const auto at = [&](int i) { return pointer<const void>(weights[i]); };
  const ca3d::TemporalBlockWeights parsed{
      at(0), at(1), at(2), at(3), pointer<const float>(weights[4]), at(5), at(6), at(7)};
  const auto clip = [](const std::array<int64_t, 4>& c) {
    return ca3d::TemporalBlockClip{pointer<void>(c[0]), c[1], c[2], c[3]};
  };
  const py::gil_scoped_release release;
  ca3d::temporal_block(problem, parsed, clip(x), clip(out), threads);
}

// Addresses of bias, scale, shift and residual_scale.
using FoldedConvAddresses = std::array<int64_t, 4>;

ca3d::FoldedConvAffine parse_affine(const FoldedConvAddresses& affine) {
  const auto at = [&](int i) { return pointer<const float>(affine[i]); };
  return {at(0), at(1), at(2), at(3)};
}

// sizes is (images, height, width, groups, inputs, outputs); residual may be 0.
void folded_conv(const std::string& dtype, const std::array<int64_t, 6>& sizes, int64_t filters,
                 const FoldedConvAddresses& affine, int64_t x, int64_t residual, int64_t z,
                 int threads) {
  const ca3d::FoldedConvProblem problem{parse_dtype(dtype), sizes[0], sizes[1], sizes[2],
                                        sizes[3],           sizes[4], sizes[5]};
  const py::gil_scoped_release release;
  ca3d::folded_conv(problem, pointer<const float>(filters), parse_affine(affine),
                    pointer<const void>(x), pointer<const void>(residual), pointer<void>(z),
                    threads);
}

// matrix is (rows, channels); residual may be 0.
void folded_epilogue(const std::string& dtype, const std::array<int64_t, 2>& matrix,
                     const FoldedConvAddresses& affine, int64_t y, int64_t residual, int64_t z,
                     int threads) {
  const ca3d::DType parsed = parse_dtype(dtype);
  const py::gil_scoped_release release;
  ca3d::folded_epilogue(parsed, matrix[0], matrix[1], parse_affine(affine), pointer<const void>(y),
                        pointer<const void>(residual), pointer<void>(z), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled CPU kernels of ca3d_kernels.";
  m.def("version", [] { return std::string(CA3D_VERSION); });
  m.def("isa", [] { return std::string(ca3d::isa_name(ca3d::current_isa())); });
  m.def("isas", &ca3d::supported_isas);
  m.def("set_isa", &ca3d::set_isa, py::arg("name"));
  m.def(
      "advise_huge_pages",
      [](int64_t address, int64_t bytes) {
        ca3d::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"));
  m.def("local_attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("o"), py::arg("threads"));
  m.def("local_attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("do"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("threads"));
  m.attr("preparam_run") = ca3d::kPreParamRun;
  def_preparam(m, "preparam_sgd_step", &preparam<ca3d::preparam_sgd_step>);
  def_preparam(m, "preparam_sgd_step_overflows", &preparam<ca3d::preparam_sgd_step_overflows>);
  m.def("normalise", &normalise, py::arg("dtype"), py::arg("matrix"), py::arg("relu"),
        py::arg("affine"), py::arg("eps"), py::arg("y"), py::arg("residual"), py::arg("statistics"),
        py::arg("z"), py::arg("threads"));
  m.def("normalise_again", &normalise_again, py::arg("dtype"), py::arg("matrix"), py::arg("relu"),
        py::arg("affine"), py::arg("eps"), py::arg("y"), py::arg("statistics"), py::arg("z"),
        py::arg("threads"));
  m.def("normalise_backward", &normalise_backward, py::arg("dtype"), py::arg("matrix"),
        py::arg("relu"), py::arg("affine"), py::arg("eps"), py::arg("y"), py::arg("statistics"),
        py::arg("dz"), py::arg("more"), py::arg("dy"), py::arg("gradients"), py::arg("threads"));
  m.def(
      "temporal_block_filter_count",
      [](const TemporalBlockArguments& arguments) {
        return ca3d::temporal_block_filter_count(parse_temporal_block(arguments));
      },
      py::arg("problem"));
  m.def("temporal_block_filters", &temporal_block_filters, py::arg("problem"),
        py::arg("column_weight"), py::arg("filters"), py::arg("threads"));
  m.def("temporal_block", &temporal_block, py::arg("problem"), py::arg("weights"), py::arg("x"),
        py::arg("out"), py::arg("threads"));
  m.def("folded_conv_panel", &ca3d::folded_conv_panel, py::arg("outputs"));
  m.def("folded_conv", &folded_conv, py::arg("dtype"), py::arg("sizes"), py::arg("filters"),
        py::arg("affine"), py::arg("x"), py::arg("residual"), py::arg("z"), py::arg("threads"));
  m.def("folded_epilogue", &folded_epilogue, py::arg("dtype"), py::arg("matrix"), py::arg("affine"),
        py::arg("y"), py::arg("residual"), py::arg("z"), py::arg("threads"));
  m.def("openmp", [] {
#ifdef _OPENMP
    return std::to_string(_OPENMP);
#else
    return std::string();
#endif
  });
}
