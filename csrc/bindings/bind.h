// What every binding file shares: ints in, parameters out, one release of the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

// A data_ptr() as Python gives it; 0 stands for None.
template <class T>
inline T* ptr(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// Items of a tuple (a torch.Size and Tensor.stride() are tuples), read without pybind11's casters: a call has forty.
inline py::handle part(const py::handle& t, py::ssize_t i) { return PyTuple_GET_ITEM(t.ptr(), i); }
inline py::ssize_t size(const py::handle& t) { return PyTuple_GET_SIZE(t.ptr()); }
inline int64_t item(const py::handle& t, py::ssize_t i) {
  const int64_t v = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
  if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
  return v;
}
template <class T = void>
T* pointer(const py::handle& t, py::ssize_t i) {
  return ptr<T>(item(t, i));
}
