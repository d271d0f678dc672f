#include "../rotary.h"

void bind_rotary(py::module_& m) {
  m.def(
      "qk_norm_rope_forward",
      [](const py::tuple& shared) {
        const fastdit::QkNormRopeParams p = fastdit::rotary_binding::parameters(shared);
        py::gil_scoped_release release;
        fastdit::cpu::qk_norm_rope_forward(p);
      },
      "rope(n(q)), rope(n(k)); without a table of its own k takes q's. See fastdit/rotary.h.");
  m.def(
      "qk_norm_rope_backward",
      [](const py::tuple& shared, py::handle q, py::handle k, py::handle compact) {
        const fastdit::QkNormRopeGradParams g = fastdit::rotary_binding::gradient_parameters(shared, q, k, compact);
        py::gil_scoped_release release;
        fastdit::cpu::qk_norm_rope_backward(g);
      },
      "Every gradient of qk_norm_rope_forward; the outputs of the operands are the gradients of q and k.");
}
