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
  int64_t block[3], blocks[3];            // queries of a block, and blocks, along each axis
  int64_t block_tiles;                    // tiles of a block
  int64_t cube[3], cubes[3];              // keys of a group, and groups, along each axis
  int64_t tiles, key_groups;
  double cost;  // (query, key) pairs that are computed
};

// First visible index on one axis: NATTEN's shifted window.
FASTDIT_INLINE int64_t window_start(const Sequence& s, int axis, int64_t i) {
  const int64_t step = s.stride[axis], start = i / step * step + step / 2 - s.window[axis] / 2;
  return max64(0, min64(start, s.grid[axis] - s.window[axis]));
}

constexpr int64_t kMostQueries = 16;  // of a block along an axis

// Queries of a block of the grid, and the shape of the cubes of 8 keys: those whose tiles touch the fewest keys. A
// block may hold several tiles: the queries of a stride's block share one window, however many they are.
inline void choose_blocks(Sequence& s, int64_t lanes) {
  constexpr int64_t kCubes[3][3] = {{1, 1, 8}, {1, 2, 4}, {2, 2, 2}};
  // cover[axis][b][log2 of the cube's side] = cubes that the blocks of b queries touch, over the axis
  int64_t cover[3][kMostQueries + 1][4];
  for (int a = 0; a < 3; ++a) {
    for (int64_t b = 1; b <= min64(kMostQueries, s.grid[a]); ++b) {
      for (int side = 0; side < 4; ++side) cover[a][b][side] = 0;
      for (int64_t first = 0; first < s.grid[a]; first += b) {
        const int64_t begin = window_start(s, a, first);
        const int64_t end = window_start(s, a, min64(first + b, s.grid[a]) - 1) + s.window[a];
        for (int side = 0; side < 4; ++side) cover[a][b][side] += ((end - 1) >> side) - (begin >> side) + 1;
      }
    }
  }
  const int64_t most = 3 * kTileVectors * lanes;
  // time of a last tile of 1 or 2 vectors, in vectors of a full one
  constexpr double kRest[3] = {0, kTileVectors == 3 ? 1.3 : 1, 2.3};
  double best = -1;
  for (const auto& cube : kCubes) {
    int side[3];
    for (int a = 0; a < 3; ++a) side[a] = cube[a] == 8 ? 3 : static_cast<int>(cube[a]) / 2;
    for (int64_t t = 1; t <= min64(kMostQueries, s.grid[0]); ++t) {
      for (int64_t h = 1; h <= min64(kMostQueries, s.grid[1]) && t * h <= most; ++h) {
        for (int64_t w = 1; w <= min64(kMostQueries, s.grid[2]) && t * h * w <= most; ++w) {
          const int64_t vectors = ceil_div(t * h * w, lanes);
          const double cost =
              static_cast<double>(cover[0][t][side[0]]) * static_cast<double>(cover[1][h][side[1]]) *
              static_cast<double>(cover[2][w][side[2]]) *
              (static_cast<double>(vectors / kTileVectors * kTileVectors) + kRest[vectors % kTileVectors]);
          if (best >= 0 && cost >= best) continue;
          best = cost;
          s.block[0] = t, s.block[1] = h, s.block[2] = w;
          s.block_tiles = ceil_div(vectors, static_cast<int64_t>(kTileVectors));
          for (int a = 0; a < 3; ++a) s.cube[a] = cube[a];
        }
      }
    }
  }
  s.tiles = s.block_tiles, s.key_groups = 1;
  for (int a = 0; a < 3; ++a) {
    s.blocks[a] = ceil_div(s.grid[a], s.block[a]);
    s.cubes[a] = ceil_div(s.grid[a], s.cube[a]);
    s.tiles *= s.blocks[a], s.key_groups *= s.cubes[a];
  }
  s.cost = best * 8 * static_cast<double>(lanes);
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
  if (p.grids) {
    for (int a = 0; a < 3; ++a) {
      s.grid[a] = p.grids[index * 3 + a];
      s.window[a] = min64(p.window[a], s.grid[a]);
      s.stride[a] = p.window_stride[a];
      s.windowed |= s.window[a] < s.grid[a];  // else every key is seen
    }
  }
  if (s.windowed && s.n) {
    choose_blocks(s, lanes);
  } else {
    const int64_t vectors = ceil_div(s.n, lanes);
    s.tiles = ceil_div(vectors, kTileVectors);
    s.key_groups = ceil_div(s.m, 8);
    s.cost = static_cast<double>(s.n) * static_cast<double>(s.m);
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
  tile.view.windowed = false;
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

// Queries of a tile of a block: whole tiles, then what is left; blocks at the end of an axis may leave some empty.
inline int64_t window_queries(const Sequence& s, const Block& b, int64_t index, int lanes) {
  const int64_t first = index % s.block_tiles * kTileVectors * lanes;
  return max64(0, min64(b.extent[0] * b.extent[1] * b.extent[2] - first, kTileVectors * lanes));
}

template <class M>
inline void window_tile(const Sequence& s, int64_t index, Tile<M>& tile) {
  const Block b = block_of(s, index / s.block_tiles);
  const int64_t before = index % s.block_tiles * kTileVectors * M::lanes;
  tile.count = static_cast<int>(window_queries(s, b, index, M::lanes));
  typename M::Index starts[3][kMostQueries];
  for (int a = 0; a < 3; ++a) {
    for (int64_t i = 0; i < b.extent[a]; ++i)
      starts[a][i] = static_cast<typename M::Index>(window_start(s, a, b.first[a] + i));
  }
  int64_t at[3] = {before / (b.extent[1] * b.extent[2]), before / b.extent[2] % b.extent[1], before % b.extent[2]};
  for (int lane = 0; lane < kTileVectors * M::lanes && tile.count; ++lane) {
    tile.query[lane] = ((b.first[0] + at[0]) * s.grid[1] + b.first[1] + at[1]) * s.grid[2] + b.first[2] + at[2];
    for (int a = 0; a < 3; ++a) tile.view.start[a][lane] = starts[a][at[a]];
    if (lane + 1 >= tile.count) continue;  // lanes without a query repeat the last one
    if (++at[2] < b.extent[2]) continue;
    at[2] = 0;
    if (++at[1] < b.extent[1]) continue;
    at[1] = 0, ++at[0];
  }
  for (int a = 0; a < 3; ++a)
    tile.view.size[a] = s.window[a], tile.view.cube[a] = s.cube[a], tile.view.cubes[a] = s.cubes[a];
  tile.view.windowed = true;
}

// Groups in [begin, end) that meet the union of the block's windows.
inline int64_t window_groups(const Sequence& s, int64_t index, int lanes, int64_t begin, int64_t end, int64_t* groups) {
  const Block b = block_of(s, index / s.block_tiles);
  if (window_queries(s, b, index, lanes) == 0) return 0;
  int64_t first[3], last[3], full_first[3], full_last[3];
  for (int a = 0; a < 3; ++a) {
    first[a] = b.union_start[a] / s.cube[a], last[a] = ceil_div(b.union_end[a], s.cube[a]);
    full_first[a] = ceil_div(b.common_start[a], s.cube[a]), full_last[a] = b.common_end[a] / s.cube[a];
  }
  const int64_t plane = s.cubes[1] * s.cubes[2];
  first[0] = max64(first[0], begin / plane), last[0] = min64(last[0], ceil_div(end, plane));
  int64_t count = 0;
  for (int64_t t = first[0]; t < last[0]; ++t) {
    for (int64_t h = first[1]; h < last[1]; ++h) {
      const bool full = t >= full_first[0] && t < full_last[0] && h >= full_first[1] && h < full_last[1];
      const int64_t row = (t * s.cubes[1] + h) * s.cubes[2];
      const int64_t w_end = min64(last[2], end - row);
      for (int64_t w = max64(first[2], begin - row); w < w_end; ++w)
        groups[count++] = 2 * (row + w) + !(full && w >= full_first[2] && w < full_last[2]);
    }
  }
  return count;
}

// The key at place i of the packed order; -1 where a cube reaches over the grid.
inline int64_t key_at(const Sequence& s, int64_t i) {
  if (!s.windowed) return i < s.m ? i : -1;
  const int64_t group = i / 8, place = i % 8;
  const int64_t t = group / (s.cubes[1] * s.cubes[2]) * s.cube[0] + place / (s.cube[1] * s.cube[2]);
  const int64_t h = group / s.cubes[2] % s.cubes[1] * s.cube[1] + place / s.cube[2] % s.cube[1];
  const int64_t w = group % s.cubes[2] * s.cube[2] + place % s.cube[2];
  return t < s.grid[0] && h < s.grid[1] && w < s.grid[2] ? (t * s.grid[1] + h) * s.grid[2] + w : -1;
}

template <class M>
inline void tile_of(const Sequence& s, int64_t index, Tile<M>& tile) {
  s.windowed ? window_tile<M>(s, index, tile) : plain_tile<M>(s, index, tile);
}
// How many queries a tile has.
inline int64_t queries_of(const Sequence& s, int64_t index, int lanes) {
  if (s.windowed) return window_queries(s, block_of(s, index / s.block_tiles), index, lanes);
  return min64(s.n, tile_vector(s, index + 1, lanes) * lanes) - tile_vector(s, index, lanes) * lanes;
}
// Groups in [begin, end) that the tile visits, as 2 * group + (1 if partly masked); returns how many.
inline int64_t groups_of(const Sequence& s, int64_t index, int lanes, int64_t begin, int64_t end, int64_t* groups) {
  return s.windowed ? window_groups(s, index, lanes, begin, end, groups)
                    : plain_groups(s, index, lanes, begin, end, groups);
}

// All groups that a tile visits lie in [begin, end).
inline void span_of(const Sequence& s, int64_t index, int lanes, int64_t& begin, int64_t& end) {
  begin = 0;
  if (!s.windowed) {
    end = ceil_div(visible_end(s, min64(s.n, tile_vector(s, index + 1, lanes) * lanes) - 1), 8);
    return;
  }
  const Block b = block_of(s, index / s.block_tiles);
  const int64_t plane = s.cubes[1] * s.cubes[2];
  begin = b.union_start[0] / s.cube[0] * plane + b.union_start[1] / s.cube[1] * s.cubes[2];
  end = window_queries(s, b, index, lanes) == 0
            ? begin
            : (ceil_div(b.union_end[0], s.cube[0]) - 1) * plane + ceil_div(b.union_end[1], s.cube[1]) * s.cubes[2];
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
inline void sort_by_cost(const double* costs, int64_t* order, int64_t count) {
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

// Cuts a sequence into tasks of similar cost. A task packs its keys anew, so it holds at least kTaskTiles tiles, and
// with a window, where a tile sees few of the keys, enough of them to see every key often.
constexpr int64_t kTaskTiles = 16;
inline int64_t tasks_in(const Sequence& s, double cost_of_task, int64_t idle) {
  if (s.tiles == 0) return 0;
  int64_t most = max64(1, s.tiles / kTaskTiles);
  if (s.windowed)
    most = max64(min64(most, idle), min64(most, static_cast<int64_t>(s.cost / (2048.0 * static_cast<double>(s.m)))));
  return max64(1, min64(most, static_cast<int64_t>(s.cost / cost_of_task) + 1));
}

}  // namespace fastdit::cpu::FASTDIT_ISA
