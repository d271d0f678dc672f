#include "fastdit/patch.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "../bind.h"

namespace {

using fastdit::PatchItem;
using fastdit::UnpatchifyItem;
using Int3 = std::array<int64_t, 3>;
using Ints = std::vector<int64_t>;

// An item travels as a flat run of ints, so that a batch and a list of videos share one entry.
constexpr size_t kPatchItem = 13, kUnpatchifyItem = 8;

void expect(const Ints& items, size_t each) {
  if (items.size() % each) throw std::invalid_argument("patch: items come as a flat list of whole records");
}

void patch_embed3d_forward(const Ints& items, int64_t weight, const std::array<int64_t, 5>& weight_stride, int64_t bias,
                           int64_t y, int64_t dim, int64_t channels, const Int3& patch, int dtype, int weight_dtype,
                           int bias_dtype, int pos_dtype, int threads) {
  expect(items, kPatchItem);
  std::vector<PatchItem> list;
  int64_t rows = 0;
  for (const int64_t* f = items.data(); f != items.data() + items.size(); f += kPatchItem) {
    list.push_back({ptr<void>(f[0]),
                    f[1],
                    {f[2], f[3], f[4]},
                    {f[5], f[6], f[7], f[8], f[9]},
                    ptr<void>(f[10]),
                    {f[11], f[12]},
                    rows});
    rows += f[1] * f[2] * f[3] * f[4];
  }
  fastdit::PatchEmbedParams p{};
  p.items = list.data(), p.num_items = static_cast<int64_t>(list.size()), p.rows = rows;
  p.weight = ptr<void>(weight), p.bias = ptr<void>(bias), p.y = ptr<void>(y);
  for (int i = 0; i < 5; ++i) p.weight_stride[i] = weight_stride[i];
  for (int i = 0; i < 3; ++i) p.patch[i] = patch[i];
  p.dim = dim, p.channels = channels;
  p.dtype = dtype, p.weight_dtype = weight_dtype, p.bias_dtype = bias_dtype, p.pos_dtype = pos_dtype;
  p.threads = threads;
  const py::gil_scoped_release release;
  fastdit::cpu::patch_embed3d_forward(p);
}

void unpatchify3d_forward(const Ints& items, int64_t channels, const Int3& patch, const std::array<int64_t, 4>& offset,
                          int itemsize, int threads) {
  expect(items, kUnpatchifyItem);
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
  fastdit::cpu::unpatchify3d_forward(p);
}

}  // namespace

void bind_patch(py::module_& m) {
  m.def("patch_embed3d_forward", &patch_embed3d_forward,
        "items: per video (x, batch, t, h, w, 5 strides of x, pos, 2 strides of pos).");
  m.def("unpatchify3d_forward", &unpatchify3d_forward,
        "items: per video (tokens, y, batch, t, h, w, 2 strides of tokens); offset: strides in a token along c, t, h, "
        "w.");
}
