// What the bindings of the conv family share.
#pragma once

#include <algorithm>

#include "../../cuda/conv.h"
#include "cuda.h"

namespace fastdit::cuda {

template <size_t count>
void integers(const py::handle& t, int64_t (&to)[count]) {
  for (size_t i = 0; i < count; ++i) to[i] = item(t, static_cast<py::ssize_t>(i));
}

// (address, dtype, sizes, strides) of a (B, C, T, H, W) tensor, or None
struct Video {
  void* data = nullptr;
  int dtype = 0;
  int64_t shape[5] = {}, stride[5] = {};
  explicit Video(const py::handle& t) {
    if (t.is_none()) return;
    data = pointer(t, 0), dtype = static_cast<int>(item(t, 1));
    integers(part(t, 2), shape), integers(part(t, 3), stride);
  }
};

// (address, dtype) of a vector, or None
inline void vector(const py::handle& t, const void*& data, int& dtype) {
  if (t.is_none()) return;
  data = pointer<const void>(t, 0), dtype = static_cast<int>(item(t, 1));
}

inline void copy(const int64_t (&from)[5], int64_t (&to)[5]) { std::copy(from, from + 5, to); }

}  // namespace fastdit::cuda
