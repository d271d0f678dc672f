#include "../bind.h"

void bind_attention(py::module_&) {}
