#include "../modulation.h"

void bind_modulation(py::module_& m) {
  m.def(
      "modulation_forward",
      [](const py::tuple& shared, int64_t r, int64_t h) {
        const fastdit::ModulationParams p = fastdit::parameters(shared, r, h);
        py::gil_scoped_release release;
        fastdit::cpu::modulation_forward(p);
      },
      "r = residual + act(gate) * [rms](y); h = n(r) * (1 + scale) + shift; see fastdit/modulation.h.");
  m.def(
      "modulation_backward",
      [](const py::tuple& shared, const py::args& grads) {
        const fastdit::ModulationGradParams q = fastdit::gradient_parameters(shared, grads);
        py::gil_scoped_release release;
        fastdit::cpu::modulation_backward(q);
      },
      "Every gradient of modulation_forward; see fastdit/modulation.h.");
}
