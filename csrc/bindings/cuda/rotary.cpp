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
}

}  // namespace fastdit::cuda
