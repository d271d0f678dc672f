#include "../bind.h"

void bind_modulation(py::module_&) {}
