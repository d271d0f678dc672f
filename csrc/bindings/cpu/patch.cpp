#include "../bind.h"

void bind_patch(py::module_&) {}
