// Python module `_native`: raw pointers, sizes and strides in, kernels out. It knows no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/dispatch.h"
#include "common/dtype.h"
#include "local_attention/local_attention.h"
#include "preparam_step/preparam_step.h"

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

template <auto kFunction>
auto preparam(const PreParamTable& table, const std::string& param, const std::string& pre_param,
              const std::array<double, 6>& hyper, bool nesterov, const std::string& rounding,
              int threads) {
  const ca3d::PreParamStep step = parse_step(param, pre_param, hyper, nesterov, rounding);
  const std::vector<ca3d::PreParamRun> runs = parse_runs(table);
  const py::gil_scoped_release release;
  return kFunction(step, runs.data(), static_cast<int64_t>(runs.size()), threads);
}

template <class Function>
void def_preparam(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::arg("table"), py::arg("param"), py::arg("pre_param"), py::arg("hyper"),
        py::arg("nesterov"), py::arg("rounding"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled CPU kernels of ca3d_kernels.";
  m.def("version", [] { return std::string(CA3D_VERSION); });
  m.def("isa", [] { return std::string(ca3d::isa_name(ca3d::current_isa())); });
  m.def("isas", &ca3d::supported_isas);
  m.def("set_isa", &ca3d::set_isa, py::arg("name"));
  m.def("local_attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("o"), py::arg("threads"));
  m.def("local_attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("do"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("threads"));
  def_preparam(m, "preparam_sgd_step", &preparam<ca3d::preparam_sgd_step>);
  def_preparam(m, "preparam_sgd_step_overflows", &preparam<ca3d::preparam_sgd_step_overflows>);
  m.def("openmp", [] {
#ifdef _OPENMP
    return std::to_string(_OPENMP);
#else
    return std::string();
#endif
  });
}
