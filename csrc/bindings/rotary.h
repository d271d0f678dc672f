// Rotary's parameters as Python gives them, for every compiled backend. Mirrored by backends/_rotary_abi.py.
#pragma once

#include "bind.h"
#include "fastdit/rotary.h"

namespace fastdit {
namespace rotary_binding {

// (address, shape, strides, address of the output); a shape (N, H, D) is a batch of one. The output is contiguous,
// or x itself.
inline RotaryOperand operand(const py::handle& t) {
  RotaryOperand o{};
  o.x = pointer(t, 0);
  o.out = pointer(t, 3);
  const py::handle shape = part(t, 1), strides = part(t, 2);
  const py::ssize_t rank = size(shape);
  o.tokens = item(shape, rank - 3);
  o.heads = item(shape, rank - 2);
  for (int i = 0; i < 3; ++i) o.x_stride[i] = rank == 3 && i == 0 ? 0 : item(strides, rank - 4 + i);
  const int64_t D = item(shape, rank - 1);
  const int64_t contiguous[3] = {o.tokens * o.heads * D, o.heads * D, D};
  for (int i = 0; i < 3; ++i) o.out_stride[i] = o.x == o.out ? o.x_stride[i] : contiguous[i];
  return o;
}

// None, or (address, dtype)
inline void vector(const py::handle& t, const void*& data, int& dtype) {
  if (t.is_none()) return;
  data = pointer<const void>(t, 0);
  dtype = static_cast<int>(item(t, 1));
}

// None, or (address of cos, of sin, shape, strides of cos, of sin, dtype) of a table (N, R/2), (N, H, R/2) or
// (B, N, H, R/2): strides over (B, N, H, R/2), 0 where it broadcasts.
inline RotaryTable table(const py::handle& t) {
  RotaryTable out{};
  if (t.is_none()) return out;
  out.cos = pointer(t, 0);
  out.sin = pointer(t, 1);
  out.dtype = static_cast<int>(item(t, 5));
  const py::handle shape = part(t, 2), cos = part(t, 3), sin = part(t, 4);
  const int rank = static_cast<int>(size(shape));
  for (int i = 0; i < rank; ++i) {
    const int at = i == rank - 1 ? 3 : rank == 2 ? 1 : 4 - rank + i;
    const bool broadcast = at != 3 && item(shape, i) == 1;
    out.cos_stride[at] = broadcast ? 0 : item(cos, i);
    out.sin_stride[at] = broadcast ? 0 : item(sin, i);
  }
  return out;
}

// None, or (dtype, address of grids, segments, packed, (address of cos, of sin, width, size) for each axis)
inline RotaryAxes axes(const py::handle& t) {
  RotaryAxes a{};
  if (t.is_none()) return a;
  a.dtype = static_cast<int>(item(t, 0));
  a.grids = pointer<const int32_t>(t, 1);
  a.segments = item(t, 2);
  a.packed = item(t, 3) != 0;
  a.count = static_cast<int>(size(t) - 4);
  if (a.count > 3) throw py::value_error("qk_norm_rope: at most three axes");
  for (int i = 0; i < a.count; ++i) {
    const py::handle axis = part(t, 4 + i);
    a.cos[i] = pointer(axis, 0);
    a.sin[i] = pointer(axis, 1);
    a.width[i] = item(axis, 2);
    a.size[i] = item(axis, 3);
  }
  return a;
}

// What forward and backward share: (dtype, q, k, their weights, biases, tables, axes, norm, all heads, eps, layout,
// pairs, rope_start, rope_len, native, threads).
inline QkNormRopeParams parameters(const py::tuple& a) {
  QkNormRopeParams p{};
  const py::handle q = part(a, 1), q_table = part(a, 7), k_table = part(a, 8), shape = part(q, 1);
  p.dtype = static_cast<int>(item(a, 0));
  p.q = operand(q);
  p.k = operand(part(a, 2));
  p.batch = size(shape) == 4 ? item(shape, 0) : 1;
  p.head_dim = item(shape, size(shape) - 1);
  vector(part(a, 3), p.q.weight, p.q.weight_dtype);
  vector(part(a, 4), p.k.weight, p.k.weight_dtype);
  vector(part(a, 5), p.q.bias, p.q.bias_dtype);
  vector(part(a, 6), p.k.bias, p.k.bias_dtype);
  p.q.table = table(q_table);
  p.k.table = k_table.is_none() ? p.q.table : table(k_table);
  p.axes = axes(part(a, 9));
  p.q.use_axes = p.axes.count > 0;
  p.k.use_axes = p.axes.count > 0 && k_table.is_none();
  p.norm = static_cast<RotaryNorm>(item(a, 10));
  p.all_heads = item(a, 11) != 0;
  p.eps = part(a, 12).cast<double>();
  p.layout = static_cast<RotaryLayout>(item(a, 13));
  p.rotated = 2 * item(a, 14);
  p.rope_start = item(a, 15);
  p.rope_len = item(a, 16);
  p.native = item(a, 17) != 0;
  p.threads = static_cast<int>(item(a, 18));
  return p;
}

// None, or (address, strides, addresses of the gradients of weight and bias, table of gradients) for an operand.
inline RotaryGrad gradient(const py::handle& t) {
  RotaryGrad g{};
  if (t.is_none()) return g;
  g.grad = pointer<const void>(t, 0);
  const py::handle strides = part(t, 1);
  const py::ssize_t rank = size(strides);
  for (int i = 0; i < 3; ++i) g.grad_stride[i] = rank == 3 && i == 0 ? 0 : item(strides, rank - 4 + i);
  g.weight = pointer(t, 2);
  g.bias = pointer(t, 3);
  g.table = table(part(t, 4));
  return g;
}

// What the parameters of a backward are made of; the outputs of the operands are the gradients of q and k.
inline QkNormRopeGradParams gradient_parameters(const py::tuple& shared, const py::handle& q, const py::handle& k,
                                                const py::handle& compact) {
  QkNormRopeGradParams g{};
  g.forward = parameters(shared);
  g.q = gradient(q);
  g.k = gradient(k);
  g.axes = axes(compact);
  return g;
}

}  // namespace rotary_binding
}  // namespace fastdit
