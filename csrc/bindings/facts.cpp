// The facts of a call, as python/fastdit/backends/_facts.py says them: a third of the host's cost of an op, half of it
// here. Written against Python's own interface, since pybind11's way into a function costs as much as this one.
#include <pybind11/pybind11.h>

namespace {

PyTypeObject* tensor_types[2];  // Tensor and Parameter; a subclass may compute its shape, and is refused
PyTypeObject* size_type;        // torch.Size
constexpr Py_ssize_t most_tensors = 32;
PyObject *shape, *stride, *dtype, *device, *get_device, *is_cpu;

bool plain(PyObject* a) {
  const PyTypeObject* type = Py_TYPE(a);
  return a == Py_None || type == &PyUnicode_Type || type == &PyFloat_Type || type == &PyLong_Type ||
         type == &PyBool_Type || type == &PyTuple_Type || type == size_type;
}

PyObject* call(PyObject* t, PyObject* method) {
  PyObject* self[] = {t};
  return PyObject_VectorcallMethod(method, self, 1, nullptr);
}

// The number of the accelerator's device, of which a torch has one kind; True for the CPU, else the device.
PyObject* place(PyObject* t) {
  PyObject* found = call(t, get_device);
  if (!found || PyLong_AsLong(found) >= 0) return found;
  Py_SETREF(found, PyObject_GetAttr(t, is_cpu));
  if (found == Py_False) Py_SETREF(found, PyObject_GetAttr(t, device));
  return found;
}

bool is_tensor(PyObject* a) { return Py_TYPE(a) == tensor_types[0] || Py_TYPE(a) == tensor_types[1]; }

// Shape, strides, dtype and place to made[at] and the next three; false, with an exception, where t has no strides.
bool add_tensor(PyObject* made, Py_ssize_t at, PyObject* t) {
  for (int i = 0; i < 4; ++i) {
    PyObject* fact = i == 0   ? PyObject_GetAttr(t, shape)
                     : i == 1 ? call(t, stride)
                     : i == 2 ? PyObject_GetAttr(t, dtype)
                              : place(t);
    if (!fact) return false;
    PyTuple_SET_ITEM(made, at + i, fact);
  }
  return true;
}

// One flat tuple: nested ones take longer to compare. A torch.Size, strides, a dtype and a place in a row are a tensor:
// no argument is a dtype.
PyObject* facts(PyObject*, PyObject* args) {
  if (!size_type || !PyTuple_Check(args)) Py_RETURN_NONE;
  const Py_ssize_t n = PyTuple_GET_SIZE(args);
  Py_ssize_t count = n, at = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* a = PyTuple_GET_ITEM(args, i);
    if (is_tensor(a))
      count += 3;
    else if (!plain(a))
      Py_RETURN_NONE;
  }
  PyObject* made = PyTuple_New(count);
  if (!made) return nullptr;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* a = PyTuple_GET_ITEM(args, i);
    if (!is_tensor(a)) {
      Py_INCREF(a);
      PyTuple_SET_ITEM(made, at++, a);
    } else if (add_tensor(made, at, a)) {
      at += 4;
    } else {
      Py_DECREF(made);
      if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return nullptr;
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  return made;
}

// Whether a call's arguments are those of constants, where Ellipsis stands for any tensor; the tensors to found.
bool same_constants(PyObject* constants, PyObject* given, PyObject** found, Py_ssize_t* count) {
  const Py_ssize_t n = PyTuple_GET_SIZE(constants);
  if (n != PyTuple_GET_SIZE(given)) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject *c = PyTuple_GET_ITEM(constants, i), *g = PyTuple_GET_ITEM(given, i);
    if (c == Py_Ellipsis) {
      if (!is_tensor(g) || *count == most_tensors) return false;
      found[(*count)++] = g;
    } else if (c != g && (Py_TYPE(c) != Py_TYPE(g) || PyObject_RichCompareBool(c, g, Py_EQ) != 1)) {
      return false;
    }
  }
  return true;
}

// recent(calls, given, settings...) -> the one of calls with these facts, which moves up a place; None where none has
// them. calls: a list of (check of all tensors, constants, settings, ...).
PyObject* recent(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 2 || !PyList_Check(args[0]) || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "recent: expected a list, a tuple and settings");
    return nullptr;
  }
  PyObject *calls = args[0], *tensors[most_tensors];
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(calls); ++i) {
    PyObject *call = PyList_GET_ITEM(calls, i), *settings = PyTuple_GET_ITEM(call, 2);
    bool same = PyTuple_GET_SIZE(settings) == count - 2;
    for (Py_ssize_t j = 2; same && j < count; ++j) same = PyTuple_GET_ITEM(settings, j - 2) == args[j];
    Py_ssize_t n = 0;
    if (!same || !same_constants(PyTuple_GET_ITEM(call, 1), args[1], tensors, &n)) {
      PyErr_Clear();  // values that cannot be compared are not the same
      continue;
    }
    Py_INCREF(call);
    PyObject* held = PyObject_Vectorcall(PyTuple_GET_ITEM(call, 0), tensors, n, nullptr);
    if (!held) PyErr_Clear();
    Py_XDECREF(held);
    if (held == Py_True) {
      if (i > 0 && i < PyList_GET_SIZE(calls) && PyList_GET_ITEM(calls, i) == call) {
        PyList_SET_ITEM(calls, i, PyList_GET_ITEM(calls, i - 1));
        PyList_SET_ITEM(calls, i - 1, call);
      }
      return call;
    }
    Py_DECREF(call);
  }
  Py_RETURN_NONE;
}

PyObject* facts_types(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *size;
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyType_Type, &tensor, &PyType_Type, &parameter, &PyType_Type, &size))
    return nullptr;
  PyObject** const names[] = {&shape, &stride, &dtype, &device, &get_device, &is_cpu};
  const char* const texts[] = {"shape", "stride", "dtype", "device", "get_device", "is_cpu"};
  for (int i = 0; i < 6; ++i)
    if (!(*names[i] = PyUnicode_InternFromString(texts[i]))) return nullptr;
  for (PyObject* type : {tensor, parameter, size}) Py_INCREF(type);  // for good
  tensor_types[0] = reinterpret_cast<PyTypeObject*>(tensor);
  tensor_types[1] = reinterpret_cast<PyTypeObject*>(parameter);
  size_type = reinterpret_cast<PyTypeObject*>(size);
  Py_RETURN_NONE;
}

// any_of(questions): whether one of these callables, a tuple, gives something true.
PyObject* any_of(PyObject*, PyObject* questions) {
  if (!PyTuple_Check(questions)) {
    PyErr_SetString(PyExc_TypeError, "any_of: expected a tuple of callables");
    return nullptr;
  }
  int found = 0;
  for (Py_ssize_t i = 0; found == 0 && i < PyTuple_GET_SIZE(questions); ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GET_ITEM(questions, i));
    found = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
  }
  return found < 0 ? nullptr : PyBool_FromLong(found);
}

PyMethodDef methods[] = {
    {"facts", facts, METH_O, "facts(args) -> tuple, or None where facts of an argument cannot be kept"},
    {"recent", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(recent)), METH_FASTCALL,
     "recent(calls, given, *settings) -> the one of calls with these facts, or None"},
    {"any_of", any_of, METH_O, "any_of(questions) -> whether one of these callables gives something true"},
    {"facts_types", facts_types, METH_VARARGS, "facts_types(Tensor, Parameter, Size), once, before facts"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_facts(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw pybind11::error_already_set();
}
