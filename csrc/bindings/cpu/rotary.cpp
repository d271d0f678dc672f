#include "../bind.h"

void bind_rotary(py::module_&) {}
