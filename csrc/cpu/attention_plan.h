// Which queries form a tile, which key groups a tile visits, and how the work is cut into tasks.
#pragma once

#include "attention_tile.h"
#include "fastdit/attention.h"

namespace fastdit::cpu::FASTDIT_ISA {

FASTDIT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDIT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTDIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One sequence: a sample of the batch or a packed segment.
struct Sequence {
  int64_t batch, first_q, first_k;  // batch index of the strides; first rows
  int64_t n, m;                     // queries, keys
  int64_t position;                 // of query 0 among the keys (frame-causal)
  int64_t frame;                    // tokens per frame, 0: no causality
  bool windowed;
  int64_t grid[3], window[3], stride[3];  // windows are cut to the grid
  int64_t block[3], blocks[3];            // queries of a tile, and tiles, along each axis
  int64_t tiles;
};

// First visible index on one axis: NATTEN's shifted window.
FASTDIT_INLINE int64_t window_start(const Sequence& s, int axis, int64_t i) {
  const int64_t step = s.stride[axis], start = i / step * step + step / 2 - s.window[axis] / 2;
  return max64(0, min64(start, s.grid[axis] - s.window[axis]));
}

// The block of queries, at most `lanes` of them, whose windows together cost the fewest keys.
inline void choose_block(Sequence& s, int64_t lanes) {
  double best = -1;
  for (int a = 0; a < 3; ++a) s.block[a] = 1;
  for (int64_t t = 1; t <= min64(lanes, s.grid[0]); ++t) {
    for (int64_t h = 1; h <= min64(lanes / t, s.grid[1]); ++h) {
      for (int64_t w = 1; w <= min64(lanes / (t * h), s.grid[2]); ++w) {
        const int64_t block[3] = {t, h, w};
        double cost = 1;
        for (int a = 0; a < 3; ++a) {
          // starts move in steps of the stride; a block that divides it shares one window
          const int64_t shift = s.stride[a] % block[a] == 0 ? 0 : ceil_div(block[a] - 1, s.stride[a]) * s.stride[a];
          int64_t keys = min64(s.grid[a], s.window[a] + shift);
          if (a == 2 && keys < s.grid[a]) keys += 7;  // keys travel in groups of 8
          cost *= static_cast<double>(ceil_div(s.grid[a], block[a]) * keys);
        }
        if (best < 0 || cost < best) {
          best = cost;
          for (int a = 0; a < 3; ++a) s.block[a] = block[a];
        }
      }
    }
  }
  s.tiles = 1;
  for (int a = 0; a < 3; ++a) {
    s.blocks[a] = ceil_div(s.grid[a], s.block[a]);
    s.tiles *= s.blocks[a];
  }
}

inline Sequence sequence_of(const AttentionParams& p, int64_t index, int lanes) {
  Sequence s = {};
  if (p.cu_q) {
    s.first_q = p.cu_q[index], s.first_k = p.cu_k[index];
    s.n = p.cu_q[index + 1] - s.first_q, s.m = p.cu_k[index + 1] - s.first_k;
    s.position = s.m - s.n;
  } else {
    s.batch = index;
    s.n = p.q_len, s.m = p.kv_len ? p.kv_len[index] : p.k_len;
    s.position = p.k_len - p.q_len;
  }
  s.frame = p.frame_tokens_of ? p.frame_tokens_of[index] : p.frame_tokens;
  s.windowed = p.grids != nullptr;
  if (s.windowed) {
    for (int a = 0; a < 3; ++a) {
      s.grid[a] = p.grids[index * 3 + a];
      s.window[a] = min64(p.window[a], s.grid[a]);
      s.stride[a] = p.window_stride[a];
    }
    choose_block(s, static_cast<int64_t>(kTileVectors) * lanes);
  } else {
    const int64_t vectors = ceil_div(s.n, lanes);
    s.tiles = ceil_div(vectors, kTileVectors);
  }
  return s;
}

// First vector of a plain tile. A last tile of one vector would wait on its own latency: 3 + 1 become 2 + 2.
FASTDIT_INLINE int64_t tile_vector(const Sequence& s, int64_t tile, int lanes) {
  const int64_t vectors = ceil_div(s.n, lanes);
  if (tile >= s.tiles) return vectors;
  const bool split = kTileVectors == 3 && vectors % 3 == 1 && vectors > 3 && tile == s.tiles - 1;
  return tile * kTileVectors - split;
}

// First key that a plain query does not see.
FASTDIT_INLINE int64_t visible_end(const Sequence& s, int64_t query) {
  if (!s.frame) return s.m;
  const int64_t position = query + s.position;
  return position < 0 ? 0 : min64(s.m, (position / s.frame + 1) * s.frame);
}

// The queries of a tile, and what each of them sees.
template <class M>
struct Tile {
  int count;                               // queries
  int64_t query[kTileVectors * M::lanes];  // their index in the sequence
  TileView<M> view;
};

// A run of consecutive tokens.
template <class M>
inline void plain_tile(const Sequence& s, int64_t index, Tile<M>& tile) {
  const int64_t first = tile_vector(s, index, M::lanes) * M::lanes;
  const int64_t last = min64(s.n, tile_vector(s, index + 1, M::lanes) * M::lanes);
  tile.count = static_cast<int>(last - first);
  for (int lane = 0; lane < kTileVectors * M::lanes; ++lane) {
    tile.query[lane] = min64(first + lane, last - 1);
    tile.view.end[lane] = static_cast<typename M::Index>(visible_end(s, tile.query[lane]));
  }
  tile.view.height = 1, tile.view.width = max64(1, s.m), tile.view.windowed = false;
}

// Groups in [begin, end) that a plain tile sees: keys up to the first query's end by every lane, up to the last's by
// some.
inline int64_t plain_groups(const Sequence& s, int64_t index, int lanes, int64_t begin, int64_t end, int64_t* groups) {
  const int64_t common = visible_end(s, tile_vector(s, index, lanes) * lanes);
  const int64_t most = visible_end(s, min64(s.n, tile_vector(s, index + 1, lanes) * lanes) - 1);
  const int64_t last = min64(end, ceil_div(most, 8));
  for (int64_t g = begin; g < last; ++g) groups[g - begin] = 2 * g + (g * 8 + 8 > common);
  return max64(0, last - begin);
}

// A block of queries of the grid, and the unions and intersections of their windows along each axis.
struct Block {
  int64_t first[3], extent[3];
  int64_t union_start[3], union_end[3], common_start[3], common_end[3];
};

inline Block block_of(const Sequence& s, int64_t index) {
  Block b;
  const int64_t at[3] = {index / (s.blocks[1] * s.blocks[2]), index / s.blocks[2] % s.blocks[1], index % s.blocks[2]};
  for (int a = 0; a < 3; ++a) {
    b.first[a] = at[a] * s.block[a];
    b.extent[a] = min64(s.block[a], s.grid[a] - b.first[a]);
    b.union_start[a] = window_start(s, a, b.first[a]);
    b.common_start[a] = window_start(s, a, b.first[a] + b.extent[a] - 1);  // starts never decrease
    b.union_end[a] = b.common_start[a] + s.window[a];
    b.common_end[a] = b.union_start[a] + s.window[a];
  }
  return b;
}

template <class M>
inline void window_tile(const Sequence& s, int64_t index, Tile<M>& tile) {
  const Block b = block_of(s, index);
  tile.count = static_cast<int>(b.extent[0] * b.extent[1] * b.extent[2]);
  for (int lane = 0; lane < kTileVectors * M::lanes; ++lane) {
    const int64_t i = lane < tile.count ? lane : tile.count - 1;
    const int64_t token[3] = {b.first[0] + i / (b.extent[1] * b.extent[2]), b.first[1] + i / b.extent[2] % b.extent[1],
                              b.first[2] + i % b.extent[2]};
    tile.query[lane] = (token[0] * s.grid[1] + token[1]) * s.grid[2] + token[2];
    for (int a = 0; a < 3; ++a) tile.view.start[a][lane] = static_cast<typename M::Index>(window_start(s, a, token[a]));
    tile.view.end[lane] = static_cast<typename M::Index>(s.m);
  }
  for (int a = 0; a < 3; ++a) tile.view.size[a] = s.window[a];
  tile.view.height = s.grid[1], tile.view.width = s.grid[2], tile.view.windowed = true;
}

// Groups in [begin, end) that meet the union of the block's windows, row by row of the key grid.
inline int64_t window_groups(const Sequence& s, int64_t index, int64_t begin, int64_t end, int64_t* groups) {
  const Block b = block_of(s, index);
  const int64_t plane = s.grid[1] * s.grid[2];
  const int64_t first_plane = max64(b.union_start[0], begin * 8 / plane);
  const int64_t last_plane = min64(b.union_end[0], ceil_div(end * 8, plane));
  int64_t count = 0, previous = -1;
  for (int64_t t = first_plane; t < last_plane; ++t) {
    for (int64_t h = b.union_start[1]; h < b.union_end[1]; ++h) {
      const bool whole_row =
          t >= b.common_start[0] && t < b.common_end[0] && h >= b.common_start[1] && h < b.common_end[1];
      const int64_t row = (t * s.grid[1] + h) * s.grid[2];
      const int64_t first = row + b.union_start[2], last = row + b.union_end[2];
      for (int64_t g = max64(first / 8, begin); g < end && g * 8 < last; ++g) {
        if (g == previous) {
          groups[count - 1] |= 1;  // shared by two rows
          continue;
        }
        const bool full = whole_row && g * 8 >= row + b.common_start[2] && g * 8 + 8 <= row + b.common_end[2];
        groups[count++] = 2 * g + !full;
        previous = g;
      }
    }
  }
  return count;
}

template <class M>
inline void tile_of(const Sequence& s, int64_t index, Tile<M>& tile) {
  s.windowed ? window_tile<M>(s, index, tile) : plain_tile<M>(s, index, tile);
}
// How many queries a tile has.
inline int64_t queries_of(const Sequence& s, int64_t index, int lanes) {
  if (!s.windowed) return min64(s.n, tile_vector(s, index + 1, lanes) * lanes) - tile_vector(s, index, lanes) * lanes;
  const Block b = block_of(s, index);
  return b.extent[0] * b.extent[1] * b.extent[2];
}
// Groups in [begin, end) that the tile visits, as 2 * group + (1 if partly masked); returns how many.
inline int64_t groups_of(const Sequence& s, int64_t index, int lanes, int64_t begin, int64_t end, int64_t* groups) {
  return s.windowed ? window_groups(s, index, begin, end, groups) : plain_groups(s, index, lanes, begin, end, groups);
}

// Row (batch, token, head) of a tensor whose channels are contiguous.
template <class T>
const T* row(const void* base, const int64_t (&stride)[3], int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(base) + batch * stride[0] + token * stride[1] + head * stride[2];
}
template <class T>
T* row(void* base, const int64_t (&stride)[3], int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(base) + batch * stride[0] + token * stride[1] + head * stride[2];
}

// Indices 0 .. count, the most expensive first: shell sort.
inline void sort_by_cost(const int64_t* costs, int64_t* order, int64_t count) {
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  for (int64_t gap = count / 2; gap > 0; gap /= 2) {
    for (int64_t i = gap; i < count; ++i) {
      const int64_t index = order[i];
      int64_t j = i;
      for (; j >= gap && costs[order[j - gap]] < costs[index]; j -= gap) order[j] = order[j - gap];
      order[j] = index;
    }
  }
}

struct Task {
  int64_t sequence, first_tile, last_tile;
};

// Cuts the sequences into at most `capacity` tasks of similar cost, the longest sequences first; returns how many.
// A task packs its keys anew, so it holds at least kTaskTiles tiles.
constexpr int64_t kTaskTiles = 16;
inline int64_t tasks_in(const Sequence& s, double cost_of_task) {
  const double cost = static_cast<double>(s.n) * static_cast<double>(s.m);
  const int64_t most = max64(1, s.tiles / kTaskTiles);
  return s.tiles == 0 ? 0 : max64(1, min64(most, static_cast<int64_t>(cost / cost_of_task) + 1));
}

}  // namespace fastdit::cpu::FASTDIT_ISA
