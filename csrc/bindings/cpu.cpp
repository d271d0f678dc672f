#include "bind.h"
#include "fastdit/isa.h"

void bind_modulation(py::module_&);
void bind_rotary(py::module_&);
void bind_attention(py::module_&);
void bind_patch(py::module_&);
void bind_conv(py::module_&);
void bind_activation(py::module_&);
void bind_facts(py::module_&);
void bind_record(py::module_&);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastdit CPU kernels: pointers, sizes and strides as ints; knows nothing of torch.";
  m.def("isa", [] { return fastdit::isa_name(fastdit::current_isa()); }, "The instruction set in use.");
  m.def("best_isa", [] { return fastdit::isa_name(fastdit::best_isa()); }, "The best one this machine has.");
  m.def("last_level_cache", &fastdit::last_level_cache,
        "Bytes; outputs of kernels that move more than half of it bypass it.");
  m.def("set_last_level_cache", &fastdit::set_last_level_cache, py::arg("bytes"), "For tests: 0 is none.");
  m.def("set_isa", &fastdit::set_isa, py::arg("name"), "Force one of portable, avx2, avx512, avx512_bf16.");
  bind_modulation(m);
  bind_rotary(m);
  bind_attention(m);
  bind_patch(m);
  bind_conv(m);
  bind_activation(m);
  bind_facts(m);
  bind_record(m);
}
