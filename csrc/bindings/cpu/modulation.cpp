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

// (address, dtype, rows, rows_b), or None
fastdit::TableGrad table_grad(const py::handle& h) {
  if (h.is_none()) return fastdit::TableGrad{nullptr, 0, 0, 0};
  const auto t = py::reinterpret_borrow<py::tuple>(h);
  return {ptr<void>(t[0].cast<int64_t>()), t[1].cast<int>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// The arguments that forward and backward share, in the order of ModulationParams without r and h.
ModulationParams parameters(const py::tuple& a) {
  const auto integer = [&](int i) { return a[i].cast<int64_t>(); };
  ModulationParams p{};
  p.B = integer(0), p.N = integer(1), p.C = integer(2);
  p.dtype = a[3].cast<int>(), p.residual_dtype = a[4].cast<int>();
  p.y = ptr<const void>(integer(5)), p.y_stride_b = integer(6), p.y_stride_n = integer(7);
  p.residual = ptr<const void>(integer(8)), p.residual_stride_b = integer(9), p.residual_stride_n = integer(10);
  p.gate = table(a[11]), p.shift = table(a[12]), p.scale = table(a[13]);
  p.weight = table(a[14]), p.bias = table(a[15]), p.post_weight = table(a[16]);
  p.gate_row_index = ptr<const void>(integer(17)), p.row_index = ptr<const void>(integer(18));
  p.index_is_64 = a[19].cast<int>();
  p.norm = static_cast<fastdit::Norm>(a[20].cast<int>()), p.gate_act = static_cast<fastdit::GateAct>(a[21].cast<int>());
  p.post_norm = a[22].cast<int>();
  p.eps = a[23].cast<double>(), p.post_eps = a[24].cast<double>(), p.weight_offset = a[25].cast<double>();
  p.native = a[26].cast<int>(), p.threads = a[27].cast<int>();
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
