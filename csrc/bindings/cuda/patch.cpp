#include "../patch.h"

#include "../../cuda/patch.h"
#include "cuda.h"

namespace fastdit::cuda {

void bind_patch(py::module_& m) {
  m.def(
      "patch_embed3d_forward",
      [](const py::tuple& where, const std::string& op, const py::args& a) {
        const PatchItems items = patch_items(part(a, 0));
        const PatchEmbedParams p = patch_embed_parameters(a, items);
        const Stream s = stream(where);
        const py::gil_scoped_release release;
        patch_embed3d_forward(p, s, op.c_str());
      },
      "y[n, d] = sum_k patch(n)[k] weight[d, k] + bias[d] + pos[n, d]; see csrc/bindings/patch.h.");
}

}  // namespace fastdit::cuda
