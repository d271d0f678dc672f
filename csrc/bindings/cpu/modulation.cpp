#include "fastdit/modulation.h"

#include "../bind.h"

using fastdit::ModulationParams;
using fastdit::Table;

namespace {

// (address, dtype, stride_b, stride_m, tokens_per_row), or None
Table table(const py::handle& t) {
  if (t.is_none()) return Table{nullptr, 0, 0, 0, 1};
  return Table{pointer<const void>(t, 0), static_cast<int>(item(t, 1)), item(t, 2), item(t, 3), item(t, 4)};
}

// (address, dtype, rows, rows_b), or None
fastdit::TableGrad table_grad(const py::handle& t) {
  if (t.is_none()) return fastdit::TableGrad{nullptr, 0, 0, 0};
  return {pointer(t, 0), static_cast<int>(item(t, 1)), item(t, 2), item(t, 3)};
}

// The arguments that forward and backward share, in the order of ModulationParams without r and h.
ModulationParams parameters(const py::tuple& a) {
  const auto code = [&](int i) { return static_cast<int>(item(a, i)); };
  ModulationParams p{};
  p.B = item(a, 0), p.N = item(a, 1), p.C = item(a, 2);
  p.dtype = code(3), p.residual_dtype = code(4);
  p.y = pointer<const void>(a, 5), p.y_stride_b = item(a, 6), p.y_stride_n = item(a, 7);
  p.residual = pointer<const void>(a, 8), p.residual_stride_b = item(a, 9), p.residual_stride_n = item(a, 10);
  p.gate = table(part(a, 11)), p.shift = table(part(a, 12)), p.scale = table(part(a, 13));
  p.weight = table(part(a, 14)), p.bias = table(part(a, 15)), p.post_weight = table(part(a, 16));
  p.gate_row_index = pointer<const void>(a, 17), p.row_index = pointer<const void>(a, 18);
  p.index_is_64 = code(19);
  p.norm = static_cast<fastdit::Norm>(code(20)), p.gate_act = static_cast<fastdit::GateAct>(code(21));
  p.post_norm = code(22);
  p.eps = part(a, 23).cast<double>(), p.post_eps = part(a, 24).cast<double>(),
  p.weight_offset = part(a, 25).cast<double>();
  p.native = code(26), p.threads = code(27);
  return p;
}

}  // namespace

void bind_modulation(py::module_& m) {
  m.def(
      "modulation_forward",
      [](const py::tuple& shared, int64_t r, int64_t h) {
        ModulationParams p = parameters(shared);
        p.r = ptr<void>(r), p.h = ptr<void>(h);
        py::gil_scoped_release release;
        fastdit::cpu::modulation_forward(p);
      },
      "r = residual + act(gate) * [rms](y); h = n(r) * (1 + scale) + shift; see fastdit/modulation.h.");
  m.def(
      "modulation_backward",
      [](const py::tuple& shared, int64_t grad_r, int64_t grad_r_stride_b, int64_t grad_r_stride_n, int64_t grad_h,
         int64_t grad_h_stride_b, int64_t grad_h_stride_n, int64_t d_residual, int64_t d_y, py::handle gate,
         py::handle shift, py::handle scale, py::handle weight, py::handle bias, py::handle post_weight) {
        fastdit::ModulationGradParams q{};
        q.forward = parameters(shared);
        q.grad_r = ptr<const void>(grad_r), q.grad_r_stride_b = grad_r_stride_b, q.grad_r_stride_n = grad_r_stride_n;
        q.grad_h = ptr<const void>(grad_h), q.grad_h_stride_b = grad_h_stride_b, q.grad_h_stride_n = grad_h_stride_n;
        q.d_residual = ptr<void>(d_residual), q.d_y = ptr<void>(d_y);
        q.gate = table_grad(gate), q.shift = table_grad(shift), q.scale = table_grad(scale);
        q.weight = table_grad(weight), q.bias = table_grad(bias), q.post_weight = table_grad(post_weight);
        py::gil_scoped_release release;
        fastdit::cpu::modulation_backward(q);
      },
      "Every gradient of modulation_forward; see fastdit/modulation.h.");
}
