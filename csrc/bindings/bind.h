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
