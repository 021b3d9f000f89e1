// Python module `_cuda`: the CUDA kernels, and how they are launched. It can be imported, and plans
// launches, without a driver and without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/unsupported.h"
#include "local_attention/cuda_plan.h"

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

}  // namespace
}  // namespace ca3d

PYBIND11_MODULE(_cuda, m) {
  using namespace ca3d;
  m.doc() = "Compiled CUDA kernels of ca3d_kernels.";
  py::register_exception<Unsupported>(m, "Unsupported", PyExc_NotImplementedError);
  m.def("version", [] { return std::string(CA3D_VERSION); });
  m.def("local_attention_forward", &attention_forward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("o"), py::arg("device"), py::arg("stream"));
  m.def("local_attention_backward", &attention_backward, py::arg("dtype"), py::arg("sizes"),
        py::arg("window"), py::arg("scale"), py::arg("key_table"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("do"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("device"), py::arg("stream"));
#ifdef CA3D_CUDA_EMULATION
  m.def("set_order", &emulation::set_order, py::arg("order"));
#endif
}
