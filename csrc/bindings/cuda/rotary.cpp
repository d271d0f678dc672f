#include "../../cuda/rotary.h"

#include "../rotary.h"
#include "cuda.h"

namespace fastdit::cuda {

void bind_rotary(py::module_& m) {
  m.def(
      "qk_norm_rope_forward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared) {
        const QkNormRopeParams p = rotary_binding::parameters(shared);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        qk_norm_rope_forward(p, s, op.c_str());
      },
      "rope(n(q)), rope(n(k)); without a table of its own k takes q's; see fastdit/rotary.h.");
  m.def(
      "qk_norm_rope_partials",
      [](int device, const py::tuple& shared, py::handle q, py::handle k) {
        return qk_norm_rope_partials(rotary_binding::gradient_parameters(shared, q, k, py::none()), device);
      },
      "Values of fp32 that qk_norm_rope_backward needs for the sums of weights and biases.");
  m.def(
      "qk_norm_rope_backward",
      [](const py::tuple& where, const std::string& op, int64_t partial, const py::tuple& shared, py::handle q,
         py::handle k) {
        const QkNormRopeGradParams g = rotary_binding::gradient_parameters(shared, q, k, py::none());
        const Stream s = stream(where);
        py::gil_scoped_release release;
        qk_norm_rope_backward(g, ptr<float>(partial), s, op.c_str());
      },
      "Gradients of q, k, weights and biases; the outputs of the operands are the gradients of q and k.");
  m.def(
      "rotary_table_rows",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, py::handle q, py::handle k,
         int64_t cos, int64_t sin, int64_t length, bool per_head) {
        const QkNormRopeGradParams g = rotary_binding::gradient_parameters(shared, q, k, py::none());
        const Stream s = stream(where);
        py::gil_scoped_release release;
        rotary_table_rows(g, {ptr<float>(cos), ptr<float>(sin), length, per_head}, s, op.c_str());
      },
      "What each rotated token of q, or of k, adds to its row of the table, (B, length, H or 1, R/2) fp32.");
  m.def(
      "rotary_axes_sums",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, py::handle sums, int64_t cos,
         int64_t sin, int64_t length) {
        const QkNormRopeParams p = rotary_binding::parameters(shared);
        const RotaryAxes out = rotary_binding::axes(sums);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        rotary_axes_sums(p, out, {ptr<float>(cos), ptr<float>(sin), length, false}, s, op.c_str());
      },
      "The sums of those rows over the positions of every axis, in fp64.");
}

}  // namespace fastdit::cuda
