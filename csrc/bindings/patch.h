// Patch's parameters as Python gives them, for every compiled backend.
#pragma once

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bind.h"
#include "fastdit/patch.h"

namespace fastdit {

using Ints = std::vector<int64_t>;

// An item travels as a flat run of ints, so that a batch and a list of videos share one entry:
// (x, batch, t, h, w, 5 strides of x, pos, 2 strides of pos) per video.
struct PatchItems {
  std::vector<PatchItem> list;
  int64_t rows = 0;
};
inline PatchItems patch_items(const py::handle& flat) {
  constexpr size_t each = 13;
  const auto items = flat.cast<Ints>();
  if (items.size() % each) throw std::invalid_argument("patch: items come as a flat list of whole records");
  PatchItems found;
  for (const int64_t* f = items.data(); f != items.data() + items.size(); f += each) {
    found.list.push_back({ptr<void>(f[0]),
                          f[1],
                          {f[2], f[3], f[4]},
                          {f[5], f[6], f[7], f[8], f[9]},
                          ptr<void>(f[10]),
                          {f[11], f[12]},
                          found.rows});
    found.rows += f[1] * f[2] * f[3] * f[4];
  }
  return found;
}

// (items, weight, its 5 strides, bias, y, D, C, patch, dtypes of x, weight, bias and pos, threads); they live as long
// as the items.
inline PatchEmbedParams patch_embed_parameters(const py::tuple& a, const PatchItems& items) {
  const auto code = [&](int i) { return static_cast<int>(item(a, i)); };
  PatchEmbedParams p{};
  p.items = items.list.data(), p.num_items = static_cast<int64_t>(items.list.size()), p.rows = items.rows;
  p.weight = pointer<const void>(a, 1), p.bias = pointer<const void>(a, 3), p.y = pointer(a, 4);
  for (int i = 0; i < 5; ++i) p.weight_stride[i] = item(part(a, 2), i);
  p.dim = item(a, 5), p.channels = item(a, 6);
  for (int i = 0; i < 3; ++i) p.patch[i] = item(part(a, 7), i);
  p.dtype = code(8), p.weight_dtype = code(9), p.bias_dtype = code(10), p.pos_dtype = code(11);
  p.threads = code(12);
  return p;
}

}  // namespace fastdit
