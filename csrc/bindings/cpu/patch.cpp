#include "../patch.h"

#include <array>

namespace {

using fastdit::Ints;
using fastdit::UnpatchifyItem;
using Int3 = std::array<int64_t, 3>;

constexpr size_t kUnpatchifyItem = 8;

void patch_embed3d_forward(const py::args& a) {
  const fastdit::PatchItems items = fastdit::patch_items(part(a, 0));
  const fastdit::PatchEmbedParams p = fastdit::patch_embed_parameters(a, items);
  const py::gil_scoped_release release;
  fastdit::cpu::patch_embed3d_forward(p);
}

template <void (*kernel)(const fastdit::UnpatchifyParams&)>
void unpatchify3d(const Ints& items, int64_t channels, const Int3& patch, const std::array<int64_t, 4>& offset,
                  int itemsize, int threads) {
  if (items.size() % kUnpatchifyItem)
    throw std::invalid_argument("unpatchify3d: items come as a flat list of whole records");
  std::vector<UnpatchifyItem> list;
  int64_t lines = 0;
  for (const int64_t* f = items.data(); f != items.data() + items.size(); f += kUnpatchifyItem) {
    list.push_back({ptr<void>(f[0]), ptr<void>(f[1]), f[2], {f[3], f[4], f[5]}, {f[6], f[7]}, lines});
    lines += f[2] * f[3] * f[4];
  }
  fastdit::UnpatchifyParams p{};
  p.items = list.data(), p.num_items = static_cast<int64_t>(list.size()), p.lines = lines;
  p.channels = channels;
  for (int i = 0; i < 3; ++i) p.patch[i] = patch[i];
  for (int i = 0; i < 4; ++i) p.offset[i] = offset[i];
  p.itemsize = itemsize, p.threads = threads;
  const py::gil_scoped_release release;
  kernel(p);
}

}  // namespace

void bind_patch(py::module_& m) {
  m.def("patch_embed3d_forward", &patch_embed3d_forward, "See csrc/bindings/patch.h.");
  m.def("unpatchify3d_forward", &unpatchify3d<fastdit::cpu::unpatchify3d_forward>,
        "items: per video (tokens, y, batch, t, h, w, 2 strides of tokens); offset: strides in a token along c, t, h, "
        "w.");
  m.def("unpatchify3d_backward", &unpatchify3d<fastdit::cpu::unpatchify3d_backward>,
        "The same, and the values move from y to tokens.");
}
