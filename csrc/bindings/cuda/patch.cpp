#include "../patch.h"

#include "../../cuda/patch.h"
#include "cuda.h"

namespace fastdit::cuda {

// f(parameters, stream) without the GIL; `a` holds the embedding's parameters (csrc/bindings/patch.h).
template <class F>
static void embed(const py::tuple& where, const py::tuple& a, F&& f) {
  const PatchItems items = patch_items(part(a, 0));
  const PatchEmbedParams p = patch_embed_parameters(a, items);
  const Stream s = stream(where);
  const py::gil_scoped_release release;
  f(p, s);
}

void bind_patch(py::module_& m) {
  m.def(
      "patch_embed3d_forward",
      [](const py::tuple& where, const std::string& op, const py::args& a) {
        embed(where, a, [&](const PatchEmbedParams& p, Stream s) { patch_embed3d_forward(p, s, op.c_str()); });
      },
      "y[n, d] = sum_k patch(n)[k] weight[d, k] + bias[d] + pos[n, d]; see csrc/bindings/patch.h.");
  m.def(
      "patch_embed3d_dx",
      [](const py::tuple& where, const std::string& op, const py::args& a) {
        embed(where, a, [&](const PatchEmbedParams& p, Stream s) { patch_embed3d_dx(p, s, op.c_str()); });
      },
      "The gradient of x, to the items' x; y is the gradient of the tokens.");
  m.def(
      "patch_embed3d_partials",
      [](int device, const py::args& a) {
        const PatchItems items = patch_items(part(a, 0));
        const PatchEmbedParams p = patch_embed_parameters(a, items);
        return std::pair(patch_embed3d_splits(p, device), patch_embed3d_pitch(p));
      },
      "How many rows of how many fp32 values patch_embed3d_dw needs.");
  m.def(
      "patch_embed3d_dw",
      [](const py::tuple& where, const std::string& op, int64_t d_weight, int64_t d_bias, int64_t partial,
         const py::args& a) {
        embed(where, a, [&](const PatchEmbedParams& p, Stream s) {
          patch_embed3d_dw(p, ptr<void>(d_weight), ptr<void>(d_bias), ptr<float>(partial), s, op.c_str());
        });
      },
      "Gradients of weight and bias; y is the gradient of the tokens.");
  m.def(
      "patch_sum",
      [](const py::tuple& where, const std::string& op, int64_t of, int dtype, int64_t count, int64_t pitch,
         int64_t out, int out_dtype, int64_t size) {
        const Stream s = stream(where);
        const py::gil_scoped_release release;
        patch_sum({ptr<const void>(of), dtype, count, pitch, ptr<void>(out), out_dtype, size}, s, op.c_str());
      },
      "out[i] = sum over `count` rows of of[row, i], in fp32 and in their order.");
  m.def(
      "patch_move",
      [](const py::tuple& where, const std::string& op, const py::tuple& flat, const py::tuple& patch,
         const py::tuple& offset, int64_t channels, int itemsize, bool back) {
        const PatchItems items = patch_items(flat);
        PatchMove p{items.list.data(), static_cast<int64_t>(items.list.size()), channels, {}, {}, itemsize, back};
        for (int i = 0; i < 3; ++i) p.patch[i] = item(patch, i);
        for (int i = 0; i < 4; ++i) p.offset[i] = item(offset, i);
        const Stream s = stream(where);
        const py::gil_scoped_release release;
        patch_move(p, s, op.c_str());
      },
      "Tokens (the items' pos) to videos (their x), or back.");
}

}  // namespace fastdit::cuda
