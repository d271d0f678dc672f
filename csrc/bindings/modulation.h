// Modulation's parameters as Python gives them, for every compiled backend.
#pragma once

#include "bind.h"
#include "fastdit/modulation.h"

namespace fastdit {

// (address, dtype, stride_b, stride_m, tokens_per_row), or None
inline Table table(const py::handle& t) {
  if (t.is_none()) return Table{nullptr, 0, 0, 0, 1};
  return Table{pointer<const void>(t, 0), static_cast<int>(item(t, 1)), item(t, 2), item(t, 3), item(t, 4)};
}

// (address, dtype, rows, rows_b), or None
inline TableGrad table_grad(const py::handle& t) {
  if (t.is_none()) return TableGrad{nullptr, 0, 0, 0};
  return {pointer(t, 0), static_cast<int>(item(t, 1)), item(t, 2), item(t, 3)};
}

// The arguments that forward and backward share, in the order of ModulationParams without r and h.
inline ModulationParams parameters(const py::tuple& a, int64_t r = 0, int64_t h = 0) {
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
  p.norm = static_cast<Norm>(code(20)), p.gate_act = static_cast<GateAct>(code(21));
  p.post_norm = code(22);
  p.eps = part(a, 23).cast<double>(), p.post_eps = part(a, 24).cast<double>(),
  p.weight_offset = part(a, 25).cast<double>();
  p.native = code(26), p.threads = code(27);
  p.r = ptr<void>(r), p.h = ptr<void>(h);
  return p;
}

// (grad_r, its strides; grad_h, its strides; d_residual, d_y; gate, shift, scale, weight, bias, post_weight)
inline ModulationGradParams gradient_parameters(const py::tuple& shared, const py::tuple& g) {
  ModulationGradParams q{};
  q.forward = parameters(shared);
  q.grad_r = pointer<const void>(g, 0), q.grad_r_stride_b = item(g, 1), q.grad_r_stride_n = item(g, 2);
  q.grad_h = pointer<const void>(g, 3), q.grad_h_stride_b = item(g, 4), q.grad_h_stride_n = item(g, 5);
  q.d_residual = pointer(g, 6), q.d_y = pointer(g, 7);
  q.gate = table_grad(part(g, 8)), q.shift = table_grad(part(g, 9)), q.scale = table_grad(part(g, 10));
  q.weight = table_grad(part(g, 11)), q.bias = table_grad(part(g, 12)), q.post_weight = table_grad(part(g, 13));
  return q;
}

}  // namespace fastdit
