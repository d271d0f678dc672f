#include "../../cuda/modulation.h"

#include "../modulation.h"
#include "cuda.h"

namespace fastdit::cuda {

void bind_modulation(py::module_& m) {
  m.def(
      "modulation_forward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, int64_t r, int64_t h) {
        const ModulationParams p = parameters(shared, r, h);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        modulation_forward(p, s, op.c_str());
      },
      "r = residual + act(gate) * [rms](y); h = n(r) * (1 + scale) + shift; see fastdit/modulation.h.");
  m.def(
      "modulation_programs",
      [](int device, const py::tuple& shared, const py::args& grads) {
        return modulation_programs(gradient_parameters(shared, grads), device);
      },
      "How many groups of warps share the tokens of modulation_backward.");
  m.def(
      "modulation_backward",
      [](const py::tuple& where, const std::string& op, int64_t tokens, int64_t offsets, int64_t partial,
         const py::tuple& shared, const py::args& grads) {
        const ModulationGradParams q = gradient_parameters(shared, grads);
        const RowOrder order{ptr<const int32_t>(tokens), ptr<const int32_t>(offsets)};
        const Stream s = stream(where);
        py::gil_scoped_release release;
        modulation_backward(q, order, ptr<float>(partial), s, op.c_str());
      },
      "Every gradient of modulation_forward; partial: (wanted tables, 2 * programs, C) fp32.");
}

}  // namespace fastdit::cuda
