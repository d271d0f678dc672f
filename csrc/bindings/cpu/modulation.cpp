#include "fastdit/modulation.h"

#include "../bind.h"

using fastdit::ModulationParams;
using fastdit::Table;

namespace {

// (address, dtype, stride_b, stride_m, tokens_per_row), or None
Table table(const py::handle& h) {
  if (h.is_none()) return Table{nullptr, 0, 0, 0, 1};
  const auto t = py::reinterpret_borrow<py::tuple>(h);
  return Table{ptr<const void>(t[0].cast<int64_t>()), t[1].cast<int>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
               t[4].cast<int64_t>()};
}

}  // namespace

void bind_modulation(py::module_& m) {
  m.def(
      "modulation_forward",
      [](int64_t B, int64_t N, int64_t C, int dtype, int residual_dtype, int64_t y, int64_t y_stride_b,
         int64_t y_stride_n, int64_t residual, int64_t residual_stride_b, int64_t residual_stride_n, int64_t r,
         int64_t h, py::handle gate, py::handle shift, py::handle scale, py::handle weight, py::handle bias,
         py::handle post_weight, int64_t gate_row_index, int64_t row_index, int index_is_64, int norm, int gate_act,
         int post_norm, double eps, double post_eps, double weight_offset, int native, int threads) {
        ModulationParams p{};
        p.B = B, p.N = N, p.C = C, p.dtype = dtype, p.residual_dtype = residual_dtype;
        p.y = ptr<const void>(y), p.y_stride_b = y_stride_b, p.y_stride_n = y_stride_n;
        p.residual = ptr<const void>(residual);
        p.residual_stride_b = residual_stride_b, p.residual_stride_n = residual_stride_n;
        p.r = ptr<void>(r), p.h = ptr<void>(h);
        p.gate = table(gate), p.shift = table(shift), p.scale = table(scale);
        p.weight = table(weight), p.bias = table(bias), p.post_weight = table(post_weight);
        p.gate_row_index = ptr<const void>(gate_row_index), p.row_index = ptr<const void>(row_index);
        p.index_is_64 = index_is_64;
        p.norm = static_cast<fastdit::Norm>(norm), p.gate_act = static_cast<fastdit::GateAct>(gate_act);
        p.post_norm = post_norm, p.eps = eps, p.post_eps = post_eps, p.weight_offset = weight_offset;
        p.native = native, p.threads = threads;
        py::gil_scoped_release release;
        fastdit::cpu::modulation_forward(p);
      },
      "r = residual + act(gate) * [rms](y); h = n(r) * (1 + scale) + shift; see fastdit/modulation.h.");
}
