#include "../attention.h"

using namespace fastdit;

namespace {

// row_bounds_hold(address of int32, count, longest, rows): whether the bounds begin at 0, none lies below the one
// before or more than `longest` above it, and the last is at most `rows`. As lean as facts.cpp: every call asks.
PyObject* row_bounds_hold(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long values[4];
  for (int i = 0; i < 4; ++i) {
    values[i] = given == 4 ? PyLong_AsLongLong(args[i]) : -1;
    if (PyErr_Occurred()) return nullptr;
  }
  const auto [address, count, longest, rows] = values;
  const int32_t* bounds = reinterpret_cast<const int32_t*>(address);
  bool hold = count >= 1 && bounds[0] == 0 && bounds[count - 1] <= rows;
  for (long long i = 1; hold && i < count; ++i) {
    const int64_t length = int64_t{bounds[i]} - bounds[i - 1];
    hold = length >= 0 && length <= longest;
  }
  return PyBool_FromLong(hold);
}

PyMethodDef methods[] = {
    {"row_bounds_hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(row_bounds_hold)), METH_FASTCALL,
     "row_bounds_hold(address, count, longest, rows) -> whether cu_seqlens fits them"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_attention(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
  m.def(
      "attention_forward",
      [](const py::tuple& shared) {
        AttentionParams p;
        fill(p, shared);
        py::gil_scoped_release release;
        cpu::attention_forward(p);
      },
      "o = softmax(scale * q k^T) v over the visible keys, and lse; see fastdit/attention.h.");
  m.def(
      "attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle dq, py::handle dk, py::handle dv) {
        AttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.dq, p.dq_stride, dq), tensor(p.dk, p.dk_stride, dk), tensor(p.dv, p.dv_stride, dv);
        py::gil_scoped_release release;
        cpu::attention_backward(p);
      },
      "dq, dk, dv of attention_forward; see fastdit/attention.h.");
  m.def(
      "merge_attention_forward",
      [](const py::tuple& shared, py::handle o, py::handle lse) {
        MergeAttentionParams p;
        fill(p, shared);
        tensor(p.o, p.o_stride, o), tensor(p.lse, p.lse_stride, lse);
        py::gil_scoped_release release;
        cpu::merge_attention_forward(p);
      },
      "The attention over the union of two sets of keys; see fastdit/attention.h.");
  m.def(
      "merge_attention_backward",
      [](const py::tuple& shared, py::handle d_o, py::handle d_lse, py::handle d_o1, py::handle d_lse1, py::handle d_o2,
         py::handle d_lse2) {
        MergeAttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.d_o1, p.d_o1_stride, d_o1), tensor(p.d_lse1, p.d_lse1_stride, d_lse1);
        tensor(p.d_o2, p.d_o2_stride, d_o2), tensor(p.d_lse2, p.d_lse2_stride, d_lse2);
        py::gil_scoped_release release;
        cpu::merge_attention_backward(p);
      },
      "Every gradient of merge_attention_forward; see fastdit/attention.h.");
}
