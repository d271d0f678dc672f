#include "../attention.h"

using namespace fastdit;

namespace {

PyObject *shape_name, *is_cpu_name, *is_contiguous_name, *data_ptr_name, *numel_name;

// An owned reference that may be empty.
struct Owned {
  PyObject* o;
  ~Owned() { Py_XDECREF(o); }
  bool is_true() const { return o == Py_True; }
  long long value() const { return o ? PyLong_AsLongLong(o) : -1; }
};

Owned method(PyObject* t, PyObject* name) {
  PyObject* self[] = {t};
  return {PyObject_VectorcallMethod(name, self, 1, nullptr)};
}

long long rows_of(PyObject* t) {
  const Owned shape{PyObject_GetAttr(t, shape_name)};
  return shape.o && PyTuple_Check(shape.o) && PyTuple_GET_SIZE(shape.o) ? item(shape.o, 0) : -1;
}

// Whether the bounds begin at 0, none lies below the one before or more than `longest` above it, and the last is at
// most `rows`. cu: int32; on another device or with gaps they do not hold, as far as this can tell.
bool hold(PyObject* cu, long long longest, long long rows) {
  if (!Owned{PyObject_GetAttr(cu, is_cpu_name)}.is_true() || !method(cu, is_contiguous_name).is_true()) return false;
  const long long count = method(cu, numel_name).value();
  const int32_t* bounds = ptr<int32_t>(method(cu, data_ptr_name).value());
  if (PyErr_Occurred() || count < 1 || bounds[0] != 0 || bounds[count - 1] > rows) return false;
  for (long long i = 1; i < count; ++i) {
    const int64_t length = int64_t{bounds[i]} - bounds[i - 1];
    if (length < 0 || length > longest) return false;
  }
  return true;
}

// row_bounds_hold(q, k, cu_q, cu_k, max_q, max_k), without pybind11 and as lean as facts.cpp: every call asks.
PyObject* row_bounds_hold(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 6) {
    PyErr_SetString(PyExc_TypeError, "row_bounds_hold: expected q, k, cu_q, cu_k, max_q and max_k");
    return nullptr;
  }
  const long long q_rows = rows_of(args[0]), k_rows = rows_of(args[1]);
  const long long max_q = PyLong_AsLongLong(args[4]), max_k = PyLong_AsLongLong(args[5]);
  const bool same = args[2] == args[3] && q_rows == k_rows && max_q == max_k;
  const bool held = !PyErr_Occurred() && hold(args[2], max_q, q_rows) && (same || hold(args[3], max_k, k_rows));
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(held);
}

PyMethodDef methods[] = {
    {"row_bounds_hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(row_bounds_hold)), METH_FASTCALL,
     "row_bounds_hold(q, k, cu_q, cu_k, max_q, max_k) -> whether the packed rows lie as cu_seqlens says"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_attention(py::module_& m) {
  PyObject** const names[] = {&shape_name, &is_cpu_name, &is_contiguous_name, &data_ptr_name, &numel_name};
  const char* const texts[] = {"shape", "is_cpu", "is_contiguous", "data_ptr", "numel"};
  for (int i = 0; i < 5; ++i)
    if (!(*names[i] = PyUnicode_InternFromString(texts[i]))) throw py::error_already_set();
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
