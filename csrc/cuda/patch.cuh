// What the patch kernels share: which video a tile is of, where patches stand in it, and how they come to shared
// memory.
#pragma once

#include <string>

#include "launch.h"
#include "panels.h"
#include "patch.h"

namespace fastdit::cuda {

constexpr int kVideos = 16;  // that one launch can tell apart
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;  // of a processor, at least: fp32 needs more than 128 registers

// A video, or a batch of equal ones.
struct Video {
  const void* x;
  int64_t stride[5];      // of x along B, C, T, H, W
  const void* rows;       // a row per token: positions, or the tokens of a move; or null
  int64_t row_stride[2];  // along B and N
  int64_t first_row;      // in y
  int count;              // tokens of the batch
  int tokens, plane, w;   // t * h * w, h * w and w of its grid
  int first_tile;
};
struct Videos {
  Video at[kVideos];
  int count, pt, ph, pw;
};

__device__ __forceinline__ const Video& video_of(const Videos& videos, int tile) {
  int i = 0;
  while (i + 1 < videos.count && tile >= videos.at[i + 1].first_tile) ++i;
  return videos.at[i];
}

struct Token {
  int b, n;
  __device__ __forceinline__ Token(const Video& v, int row) : b(row / v.tokens), n(row - b * v.tokens) {}
  __device__ __forceinline__ int64_t row(const Video& v) const { return b * v.row_stride[0] + n * v.row_stride[1]; }
  // Where its patch begins in x.
  __device__ __forceinline__ int64_t corner(const Videos& s, const Video& v) const {
    const int t = n / v.plane, rest = n - t * v.plane, h = rest / v.w, w = rest - h * v.w;
    return b * v.stride[0] + int64_t{t} * s.pt * v.stride[2] + int64_t{h} * s.ph * v.stride[3] +
           int64_t{w} * s.pw * v.stride[4];
  }
};

// Where value k = (c, dt, dh, dw) stands from the beginning of a patch; strides along C, T, H, W.
__device__ __forceinline__ int64_t inside(const Videos& s, const int64_t* stride, int k) {
  const int dw = k % s.pw, line = k / s.pw, dh = line % s.ph, frame = line / s.ph, dt = frame % s.pt, c = frame / s.pt;
  return c * stride[0] + dt * stride[1] + dh * stride[2] + dw * stride[3];
}

// ---- from global memory to panels --------------------------------------------------------------------------
// One lane's packs of a row: `first` and every `step`th from there on. At `from` + offset(p) stands pack p; null, and
// beyond `live`: zeros. A copy of 4, 8 or 16 bytes is asynchronous: the caller commits and waits.
template <int bytes, class T, class TX, class Offset>
__device__ __forceinline__ void stage_row(T* to, const TX* from, int first, int step, int packs, int live, int width,
                                          const TX* elsewhere, Offset&& offset) {
#pragma unroll 4
  for (int p = first; p < packs; p += step) {
    const bool there = from && p < live;
    T* at = to + p * width;
    if constexpr (bytes) {
      copy_async<bytes>(at, there ? from + offset(p) : elsewhere, there ? bytes : 0);
    } else if constexpr (std::is_same_v<T, TX>) {
      *at = there ? load_again<1>(from + offset(p)).values[0] : T{};
    } else {
      for (int i = 0; i < width; ++i) at[i] = there ? to_float(load_again<1>(from + offset(p) + i).values[0]) : 0.0f;
    }
  }
}
// Rows of `packs` packs of `width` values; row(r) is where row r stands, or null. across: neighbouring lanes take eight
// rows, as neighbouring patches lie side by side; else eight packs of a row.
template <bool across, class T, class TX, class Row, class Offset>
__device__ __forceinline__ void stage(const Panel<T>& to, int rows, int packs, int live, int width, const TX* elsewhere,
                                      Row&& row, Offset&& offset) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, bytes = width * static_cast<int>(sizeof(T));
  constexpr int height = across ? 8 : 4, step = 32 / height;
  const int first = across ? lane / height : lane % step;
  for (int r = height * warp + (across ? lane % height : lane / step); r < rows; r += height * warps) {
    const TX* from = row(r);
    if constexpr (std::is_same_v<T, TX>) {
      if (bytes == 16) {
        stage_row<16>(to.row(r), from, first, step, packs, live, width, elsewhere, offset);
        continue;
      }
      if (bytes == 8) {
        stage_row<8>(to.row(r), from, first, step, packs, live, width, elsewhere, offset);
        continue;
      }
      if (bytes == 4) {
        stage_row<4>(to.row(r), from, first, step, packs, live, width, elsewhere, offset);
        continue;
      }
    }
    stage_row<0>(to.row(r), from, first, step, packs, live, width, elsewhere, offset);
  }
}

// Panels in two stages: `issue(i)` fills those of step i while `compute(i - 1)` reads the others. Each is called in one
// place only: they are most of a kernel's code.
template <class Issue, class Compute>
__device__ __forceinline__ void pipeline(int steps, Issue&& issue, Compute&& compute) {
  for (int i = 0; i <= steps; ++i) {
    if (i > 0) {
      copy_wait<0>();
      __syncthreads();  // step i - 1 is there, and nobody reads what step i overwrites
    }
    if (i < steps) issue(i), copy_commit();
    if (i > 0) compute(i - 1);
  }
}

// W values of a parameter, which is of x's type or fp32.
template <int W, class TX>
__device__ __forceinline__ void load_parameter(const void* p, int dtype, int64_t at, float (&to)[W]) {
  if (std::is_same_v<TX, float> || dtype == static_cast<int>(DType::f32))
    widen(load_again<W>(static_cast<const float*>(p) + at), to);
  else
    widen(load_again<W>(static_cast<const TX*>(p) + at), to);
}

// ---- host --------------------------------------------------------------------------------------------------
inline std::string sizes(const PatchEmbedParams& p) {
  return "tokens=" + std::to_string(p.rows) + " D=" + std::to_string(p.dim) + " C=" + std::to_string(p.channels) +
         " patch=" + std::to_string(p.patch[0]) + "," + std::to_string(p.patch[1]) + "," + std::to_string(p.patch[2]) +
         " dtype=" + std::to_string(p.dtype) + "," + std::to_string(p.weight_dtype);
}

// How many of the values k of a patch lie side by side, as a power of two of at most 16 bytes. others: what else is
// added to an address.
inline int pack_width(const void* at, int itemsize, const int64_t (&size)[4], const int64_t* stride,
                      std::initializer_list<int64_t> others) {
  int64_t run = 1, odd = 0;  // odd: every stride that an address is a sum of, or-ed: its low bits say what divides all
  bool whole = true;
  for (int i = 3; i >= 0; --i) {
    if (size[i] == 1) continue;
    whole = whole && stride[i] == run;
    if (whole)
      run *= size[i];
    else
      odd |= stride[i];
  }
  for (int64_t s : others) odd |= s;
  int width = 16 / itemsize;
  while (width > 1 && ((run | odd) % width || reinterpret_cast<uintptr_t>(at) % (width * itemsize))) width /= 2;
  return width;
}

// The packs that the patches of a video allow.
inline int patch_width(const PatchItem& item, int64_t channels, const int64_t (&patch)[3], int itemsize) {
  const auto along = [](int64_t n, int64_t stride) { return n > 1 ? stride : 0; };
  return pack_width(item.x, itemsize, {channels, patch[0], patch[1], patch[2]}, item.stride + 1,
                    {along(item.batch, item.stride[0]), along(item.grid[0], item.stride[2] * patch[0]),
                     along(item.grid[1], item.stride[3] * patch[1]), along(item.grid[2], item.stride[4] * patch[2])});
}
inline int64_t tokens_of(const PatchItem& item) { return item.batch * item.grid[0] * item.grid[1] * item.grid[2]; }

// The launches of a list: `run` gets as many videos as one can tell apart, the least of their width_of(item) and the
// sum of their tiles_of(item).
template <class WidthOf, class TilesOf, class Run>
void each_launch(const PatchItem* items, int64_t count, const int64_t (&patch)[3], const char* op, WidthOf&& width_of,
                 TilesOf&& tiles_of, Run&& run) {
  for (int64_t i = 0; i < count;) {
    Videos videos{};
    videos.pt = static_cast<int>(patch[0]), videos.ph = static_cast<int>(patch[1]);
    videos.pw = static_cast<int>(patch[2]);
    int width = 16;
    int64_t tiles = 0;
    for (; i < count && videos.count < kVideos; ++i) {
      const PatchItem& item = items[i];
      const int64_t rows = tokens_of(item);
      if (rows == 0) continue;
      if (rows + tiles > 0x7fff0000)
        throw std::invalid_argument(std::string(op) + ": too many tokens; got " + std::to_string(rows) +
                                    " of one video, expected fewer than 2^31; split the call");
      const int fits = width_of(item);
      width = fits < width ? fits : width;
      Video& v = videos.at[videos.count++];
      v.x = item.x, v.rows = item.pos, v.first_row = item.first_row;
      for (int d = 0; d < 5; ++d) v.stride[d] = item.stride[d];
      v.row_stride[0] = item.pos_stride[0], v.row_stride[1] = item.pos_stride[1];
      v.count = static_cast<int>(rows), v.tokens = static_cast<int>(rows / item.batch);
      v.plane = static_cast<int>(item.grid[1] * item.grid[2]), v.w = static_cast<int>(item.grid[2]);
      v.first_tile = static_cast<int>(tiles);
      tiles += tiles_of(item);
    }
    if (tiles) run(videos, width, static_cast<int>(tiles));
  }
}
// Of the embedding and its gradients: tiles of so many tokens, packs of the patches' values.
template <class Run>
void each_launch(const PatchEmbedParams& p, int tile, const char* op, Run&& run) {
  const int size = static_cast<int>(itemsize(static_cast<DType>(p.dtype)));
  each_launch(
      p.items, p.num_items, p.patch, op,
      [&](const PatchItem& item) { return patch_width(item, p.channels, p.patch, size); },
      [&](const PatchItem& item) { return (tokens_of(item) + tile - 1) / tile; }, run);
}

}  // namespace fastdit::cuda
