// What the bindings of the CUDA kernels share. `where` is (device, stream) as Python has them; `op` names errors.
#pragma once

#include <string>

#include "../../cuda/stream.h"
#include "../bind.h"

namespace fastdit::cuda {

inline Stream stream(const py::tuple& where) { return {static_cast<int>(item(where, 0)), pointer(where, 1)}; }

void bind_modulation(py::module_& m);
void bind_attention(py::module_& m);
void bind_conv(py::module_& m);
void bind_conv_norm(py::module_& m);
void bind_patch(py::module_& m);
void bind_rotary(py::module_& m);

inline void bind_families(py::module_& m) {
  m.def(
      "hopper_built",
      [](int) {
#if defined(FASTDIT_SM_90A)
        return true;
#else
        return false;
#endif
      },
      "Whether the module carries the kernels for sm_90a, given that the device is one.");
  bind_modulation(m);
  bind_attention(m);
  bind_conv(m);
  bind_conv_norm(m);
  bind_patch(m);
  bind_rotary(m);
}

}  // namespace fastdit::cuda
