// What python/fastdit/backends/triton/_record.py recorded, done again: `_again` there says the same in Python, at three
// times the cost. Written against Python's own interface: every call from here is one of Python's.
#include <pybind11/pybind11.h>

#include <vector>

namespace {

PyObject *data_ptr, *new_empty_strided, *dtype_name;  // the last: ("dtype",), of a vectorcall

// Owns what it holds.
struct Objects {
  std::vector<PyObject*> all;
  explicit Objects(size_t expected) { all.reserve(expected); }
  ~Objects() {
    for (PyObject* o : all) Py_XDECREF(o);
  }
  bool add(PyObject* o) {
    all.push_back(o);
    return o != nullptr;
  }
  bool add_pointer(PyObject* tensor) {
    PyObject* self[] = {tensor};
    return add(PyObject_VectorcallMethod(data_ptr, self, 1, nullptr));
  }
};

PyObject* part(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }
Py_ssize_t index(PyObject* tuple, Py_ssize_t i) { return PyLong_AsSsize_t(part(tuple, i)); }

bool allocate(PyObject* tensors, PyObject* allocations, Objects& made, Objects& pointers) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(allocations); ++i) {
    PyObject* a = part(allocations, i);  // (like, shape, strides, dtype or None)
    PyObject* call[] = {part(tensors, index(a, 0)), part(a, 1), part(a, 2), part(a, 3)};
    PyObject* names = part(a, 3) == Py_None ? nullptr : dtype_name;
    if (!made.add(PyObject_VectorcallMethod(new_empty_strided, call, 3, names))) return false;
    if (!pointers.add_pointer(made.all.back())) return false;
  }
  return true;
}

bool launch(PyObject* launches, PyObject* stream, const Objects& pointers) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); ++i) {
    PyObject* l = part(launches, i);  // (run, grid, places, rest)
    PyObject *places = part(l, 2), *rest = part(l, 3);
    const Py_ssize_t n = PyTuple_GET_SIZE(places), more = PyTuple_GET_SIZE(rest);
    PyObject* arguments = PyTuple_New(n + more);
    if (!arguments) return false;
    for (Py_ssize_t j = 0; j < n + more; ++j) {
      PyObject* o = j < n ? pointers.all[index(places, j)] : part(rest, j - n);
      Py_INCREF(o);
      PyTuple_SET_ITEM(arguments, j, o);
    }
    PyObject* call[] = {part(l, 1), stream, arguments};
    PyObject* done = PyObject_Vectorcall(part(l, 0), call, 3, nullptr);
    Py_DECREF(arguments);
    if (!done) return false;
    Py_DECREF(done);
  }
  return true;
}

PyObject* outputs(PyObject* results, const Objects& made) {
  if (PyLong_Check(results)) {
    PyObject* o = made.all[PyLong_AsSsize_t(results)];
    Py_INCREF(o);
    return o;
  }
  const Py_ssize_t n = PyTuple_GET_SIZE(results);
  PyObject* all = PyTuple_New(n);
  for (Py_ssize_t i = 0; all && i < n; ++i) {
    PyObject* o = made.all[index(results, i)];
    Py_INCREF(o);
    PyTuple_SET_ITEM(all, i, o);
  }
  return all;
}

// again((allocations, views, launches, results), tensors, stream)
PyObject* again(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != 4 || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "again: expected (allocations, views, launches, results), tensors, stream");
    return nullptr;
  }
  PyObject *allocations = part(args[0], 0), *views = part(args[0], 1), *tensors = args[1];
  const Py_ssize_t n = PyTuple_GET_SIZE(tensors);
  Objects made(PyTuple_GET_SIZE(allocations));
  Objects pointers(n + PyTuple_GET_SIZE(allocations) + 1 + PyTuple_GET_SIZE(views));
  unsigned long long low = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!pointers.add_pointer(part(tensors, i))) return nullptr;
    low |= PyLong_AsUnsignedLongLongMask(pointers.all.back());
  }
  if (low & 15) Py_RETURN_NONE;
  if (!allocate(tensors, allocations, made, pointers)) return nullptr;
  Py_INCREF(Py_None);
  pointers.add(Py_None);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(views); ++i)
    if (!pointers.add(PyNumber_Add(pointers.all[index(part(views, i), 0)], part(part(views, i), 1)))) return nullptr;
  return launch(part(args[0], 2), args[2], pointers) ? outputs(part(args[0], 3), made) : nullptr;
}

PyMethodDef methods[] = {
    {"again", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(again)), METH_FASTCALL,
     "again((allocations, views, launches, results), tensors, stream) -> outputs, or None where a tensor begins on no "
     "multiple of 16 bytes"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_record(pybind11::module_& m) {
  data_ptr = PyUnicode_InternFromString("data_ptr");
  new_empty_strided = PyUnicode_InternFromString("new_empty_strided");
  dtype_name = Py_BuildValue("(s)", "dtype");
  if (!data_ptr || !new_empty_strided || !dtype_name || PyModule_AddFunctions(m.ptr(), methods) < 0)
    throw pybind11::error_already_set();
}
