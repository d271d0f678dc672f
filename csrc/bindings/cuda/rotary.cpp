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
}

}  // namespace fastdit::cuda
