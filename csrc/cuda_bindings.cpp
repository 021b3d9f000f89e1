// Python module `_cuda`: the CUDA kernels, and how they are launched. It can be imported, and plans
// launches, without a driver and without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/cuda_device.h"
#include "common/unsupported.h"
#include "local_attention/cuda_plan.h"
#include "preparam_step/preparam_step_cuda.h"

namespace ca3d {
namespace {

using Rows = std::array<int64_t, 5>;
using Sizes = std::array<int64_t, 5>;
using WindowNumbers = std::array<int64_t, 4>;

bool is_empty(const LocalAttentionProblem& p) {
  return p.outer == 0 || p.inner == 0;
}

LocalAttentionLaunch forward_launch(const LocalAttentionProblem& problem, const Rows& q,
                                    const Rows& k, const Rows& v, const Rows& o) {
  return plan_forward(problem, parse_rows(q), parse_rows(k), parse_rows(v), parse_rows(o));
}

LocalAttentionLaunch backward_launch(const LocalAttentionProblem& problem, const Rows& q,
                                     const Rows& k, const Rows& v, const Rows& go, const Rows& dq,
                                     const Rows& dk, const Rows& dv) {
  return plan_backward(problem, parse_rows(q), parse_rows(k), parse_rows(v), parse_rows(go),
                       parse_rows(dq), parse_rows(dk), parse_rows(dv));
}

void attention_forward(const std::string& dtype, const Sizes& sizes, const WindowNumbers& window,
                       double scale, const std::vector<int64_t>& key_table, const Rows& q,
                       const Rows& k, const Rows& v, const Rows& o, int device, uintptr_t stream) {
  const auto problem = parse_attention(dtype, sizes, window, scale, key_table);
  check(problem);
  if (is_empty(problem)) return;
  const auto launch = forward_launch(problem, q, k, v, o);
  const py::gil_scoped_release release;
  run_local_attention(launch, device, reinterpret_cast<void*>(stream));
}

void attention_backward(const std::string& dtype, const Sizes& sizes, const WindowNumbers& window,
                        double scale, const std::vector<int64_t>& key_table, const Rows& q,
                        const Rows& k, const Rows& v, const Rows& go, const Rows& dq,
                        const Rows& dk, const Rows& dv, int device, uintptr_t stream) {
  const auto problem = parse_attention(dtype, sizes, window, scale, key_table);
  check(problem);
  if (is_empty(problem)) return;
  const auto launch = backward_launch(problem, q, k, v, go, dq, dk, dv);
  const py::gil_scoped_release release;
  run_local_attention(launch, device, reinterpret_cast<void*>(stream));
}

// ---- descriptions of launches ----

py::dict described(const std::string& entry, unsigned grid, unsigned block, size_t shared,
                   const char* type, const char* bytes, size_t size,
                   const std::vector<ArgumentField>& fields) {
  py::list listed;
  for (const ArgumentField& field : fields) {
    py::dict one;
    one["name"] = field.name;
    one["offset"] = field.offset;
    one["type"] = field.type;
    one["meaning"] = field.meaning;
    listed.append(one);
  }
  py::dict parameter;
  parameter["name"] = "arguments";
  parameter["type"] = type;
  parameter["bytes"] = py::bytes(bytes, size);
  parameter["fields"] = listed;
  py::list parameters;
  parameters.append(parameter);
  py::dict launch;
  launch["entry"] = entry;
  launch["grid"] = py::make_tuple(grid, 1, 1);
  launch["block"] = py::make_tuple(block, 1, 1);
  launch["shared"] = shared;
  launch["parameters"] = parameters;
  return launch;
}

py::dict described(const LocalAttentionLaunch& x) {
  return described(entry_name(x), x.grid, x.block, x.shared, "LocalAttentionArguments",
                   reinterpret_cast<const char*>(&x.arguments), sizeof x.arguments,
                   argument_fields(x));
}

py::list attention_launches(const std::string& dtype, const Sizes& sizes,
                            const WindowNumbers& window, double scale,
                            const std::vector<int64_t>& key_table,
                            const std::vector<Rows>& operands) {
  const auto problem = parse_attention(dtype, sizes, window, scale, key_table);
  check(problem);
  const auto& x = operands;
  if (x.size() != 4 && x.size() != 7) {
    throw std::invalid_argument("operands must be (q, k, v, o) or (q, k, v, do, dq, dk, dv)");
  }
  py::list launches;
  if (is_empty(problem)) return launches;
  launches.append(described(
      x.size() == 4 ? forward_launch(problem, x[0], x[1], x[2], x[3])
                    : backward_launch(problem, x[0], x[1], x[2], x[3], x[4], x[5], x[6])));
  return launches;
}

// ---- the pre-parameter step ----

// Addresses of numbers (6 float64), found_inf (float32) and largest, 0 for none.
using DeviceAddresses = std::array<uintptr_t, 3>;

PreParamDevice parse_addresses(const DeviceAddresses& addresses) {
  return {reinterpret_cast<const double*>(addresses[0]), reinterpret_cast<float*>(addresses[1]),
          reinterpret_cast<void*>(addresses[2])};
}

void preparam_step(const PreParamTable& table, const std::string& param,
                   const std::string& pre_param, const std::array<double, 6>& hyper, bool nesterov,
                   const std::string& rounding, const Random& random,
                   const DeviceAddresses& addresses, int device, uintptr_t stream) {
  const PreParamStep step = parse_step(param, pre_param, hyper, nesterov, rounding, random);
  const std::vector<PreParamRun> runs = parse_runs(table);
  const auto count = static_cast<int64_t>(runs.size());
  check(step, runs.data(), count);
  const py::gil_scoped_release release;
  run_preparam_step(step, runs.data(), count, parse_addresses(addresses), device,
                    reinterpret_cast<void*>(stream));
}

void preparam_overflows(const PreParamTable& table, const std::string& param,
                        const std::string& pre_param, const std::array<double, 6>& hyper,
                        bool nesterov, const std::string& rounding, const Random& random,
                        const DeviceAddresses& addresses, int device, uintptr_t stream) {
  const PreParamStep step = parse_step(param, pre_param, hyper, nesterov, rounding, random);
  const std::vector<PreParamRun> runs = parse_runs(table);
  const auto count = static_cast<int64_t>(runs.size());
  check(step, runs.data(), count);
  if (addresses[1] == 0) throw std::invalid_argument("found_inf must not be a null pointer");
  const py::gil_scoped_release release;
  run_preparam_overflows(step, runs.data(), count, parse_addresses(addresses), device,
                         reinterpret_cast<void*>(stream));
}

py::list preparam_launches(const PreParamTable& table, const std::string& param,
                           const std::string& pre_param, const std::array<double, 6>& hyper,
                           bool nesterov, const std::string& rounding, const Random& random,
                           const DeviceAddresses& addresses, bool overflows) {
  const PreParamStep step = parse_step(param, pre_param, hyper, nesterov, rounding, random);
  std::vector<PreParamRun> runs = parse_runs(table);
  check(step, runs.data(), static_cast<int64_t>(runs.size()));
  runs = nonempty(runs.data(), static_cast<int64_t>(runs.size()));
  const auto count = static_cast<int64_t>(runs.size());
  py::list launches;
  for (const PreParamLaunch& one : plan_preparam(runs.data(), count, allows_large_tables())) {
    const auto bytes = argument_bytes(step, one, runs.data(), parse_addresses(addresses));
    launches.append(described(entry_name(step, one, overflows), one.grid, kPreParamThreads,
                              shared_bytes(step), "PreParamArguments", bytes.data(), bytes.size(),
                              argument_fields(step, one)));
  }
  return launches;
}

template <class Function>
void def_preparam(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::arg("table"), py::arg("param"), py::arg("pre_param"), py::arg("hyper"),
        py::arg("nesterov"), py::arg("rounding"), py::arg("random"), py::arg("addresses"),
        py::arg("device"), py::arg("stream"));
}

}  // namespace
}  // namespace ca3d

PYBIND11_MODULE(_cuda, m) {
  using namespace ca3d;
  m.doc() = "Compiled CUDA kernels of ca3d_kernels.";
  py::register_exception<Unsupported>(m, "UnsupportedError", PyExc_NotImplementedError);
  m.def("version", [] { return std::string(CA3D_VERSION); });
  m.def("local_attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("o"), py::arg("device"), py::arg("stream"));
  m.def("local_attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("do"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("device"),
        py::arg("stream"));
  m.def("local_attention_launches", &attention_launches, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("operands"));
  def_preparam(m, "preparam_sgd_step", &preparam_step);
  def_preparam(m, "preparam_sgd_step_overflows", &preparam_overflows);
  m.def("preparam_launches", &preparam_launches, py::arg("table"), py::arg("param"),
        py::arg("pre_param"), py::arg("hyper"), py::arg("nesterov"), py::arg("rounding"),
        py::arg("random"), py::arg("addresses"), py::arg("overflows"));
  m.attr("PREPARAM_CHUNK") = kPreParamChunk;
  m.def("architectures", [] { return std::string(CA3D_CUDA_ARCHS); });
  m.def("runtime_version", &cuda_runtime_version);
  m.def("driver_version", &cuda_driver_version);
#ifdef CA3D_CUDA_EMULATION
  m.def("set_order", &emulation::set_order, py::arg("order"));
  m.def("atomics", &emulation::atomics);
#endif
}
