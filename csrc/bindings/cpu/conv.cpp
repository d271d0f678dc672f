#include "../bind.h"

void bind_conv(py::module_&) {}
