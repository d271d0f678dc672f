// What the kernels of sm_90a share: tiles as the copy engine and the matrix unit see them, rings of them, and the warps
// that fill the rings.
//
// A brick of tokens is fetched in runs of neighbours along w, a box of the tensor map each; a line is a single run.
// Runs outside of what the block meets are asked for behind the tensor's end, where the copy engine reads zeros. Where
// what is met ends inside a run, the rows behind are the neighbours': whoever copied the tile clears them, or a NaN
// among them would come through 0 * NaN.
#pragma once

#include "attention.cuh"
#include "ring.h"
#include "tensor_map.h"
#include "wgmma.h"

#if defined(__CUDACC__)
#pragma nv_diag_suppress 177  // other architectures refer to little of this
#endif

namespace fastdit::cuda {

// Rows of D channels as the copy engine writes and the matrix unit reads them: spans of 64 channels (32 where D is no
// multiple of 64), every row of a span beside the next, their 16-byte chunks permuted.
template <int D, int rows>
struct Spans {
  static constexpr int tokens = rows, span = D % 64 ? 32 : 64, count = D / span, row_bytes = 2 * span, chunks = D / 8;
  static constexpr int bytes = rows * D * 2;
  static constexpr Swizzle swizzle = span == 64 ? Swizzle::b128 : Swizzle::b64;

  char* data;  // 1024-byte aligned

  // Where the tokens of a span begin, from `row` on.
  __device__ __forceinline__ char* at_span(int number, int row) const {
    return data + (number * rows + row) * row_bytes;
  }
  __device__ __forceinline__ char* at(int row, int chunk) const {
    constexpr int per = span / 8;
    const int turn = span == 64 ? row % 8 : row / 2 % 4;
    return at_span(chunk / per, row) + (chunk % per ^ turn) * 16;
  }

  // Rows from `first` on as rows of A or columns of B; the next 16 channels stand at + channels_step.
  __device__ __forceinline__ uint64_t by_row(int first = 0) const {
    return matrix(at_span(0, first), 16, 8 * row_bytes, static_cast<int>(swizzle));
  }
  static constexpr __host__ __device__ uint64_t channels_step(int channel) {
    return (channel / span * rows * row_bytes + channel % span * 2) >> 4;
  }
  // Rows as the dimension that is summed over; the next 16 of them stand at + rows_step.
  __device__ __forceinline__ uint64_t by_k() const {
    return matrix(data, rows * row_bytes, 8 * row_bytes, static_cast<int>(swizzle));
  }
  static constexpr __host__ __device__ uint64_t rows_step(int row) { return row * row_bytes >> 4; }
};

template <int stages>
using Place = RingPlace<stages>;

// ---- the producer's warps ----------------------------------------------------------------------------------
// One warp. Starts the copies of a brick: runs of b.w tokens from `at` on, inside of `hi`; `row` is the segment's
// first, `behind` one that the tensor does not have.
template <class Tile>
__device__ __forceinline__ void load_brick(Tile to, const TensorMap& map, const Work& w, int head, int64_t row,
                                           int behind, Point at, Point hi, Brick b, uint64_t* full) {
  const int lane = static_cast<int>(threadIdx.x) % 32, runs = to.tokens / b.w;
  if (lane == 0) barrier_arrive_expect(full, to.bytes);
#pragma unroll 1
  for (int i = lane; i < runs * to.count; i += 32) {
    const int run = i / to.count, span = i % to.count;
    const Point in = brick_token(run * b.w, b);
    const int t = at.t + in.t, h = at.h + in.h;
    const int first = t < hi.t && h < hi.h ? static_cast<int>(row) + (t * w.H + h) * w.W + at.w : behind;
    const int box[4] = {span * to.span, head, first, w.batch};
    tensor_load(to.at_span(span, run * b.w), map, box, full);
  }
}

// The rows behind `end` of every run of `run` tokens become zero.
template <class Tile>
__device__ __forceinline__ void clear_behind(Tile tile, int run, int end) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < tile.tokens * tile.chunks; i += 32) {
    const int r = i / tile.chunks, chunk = i % tile.chunks;
    if (r % run >= end) *reinterpret_cast<uint4*>(tile.at(r, chunk)) = uint4{0, 0, 0, 0};
  }
  proxy_fence();
  __syncwarp();
}

// One warp keeps a ring full: the tile of every brick that the block meets, for each of `heads` heads from `head` on.
// clears: rows behind what is met become zero. row, behind: as above.
template <bool clears, class Tile, int stages>
class Feed {
  const TensorMap& map_;
  char* const tiles_;
  Ring<stages>& ring_;
  uint64_t* const landed_;  // full, of a tile that has rows to be cleared
  Place<stages> place_;
  int landings_ = 0;  // parity

 public:
  __device__ __forceinline__ Feed(const TensorMap& map, char* tiles, Ring<stages>& ring, uint64_t* landed)
      : map_(map), tiles_(tiles), ring_(ring), landed_(landed) {}

  __device__ __forceinline__ void run(const Work& w, Brick brick, int head, int heads, int64_t row, int behind) {
#pragma unroll 1
    for (; heads > 0; --heads, ++head) {
      Point at = first_brick(w);
#pragma unroll 1
      for (int count = w.count; count > 0; --count, at = next_brick(at, w, brick), place_.next()) {
        const Tile tile{tiles_ + place_.stage * Tile::bytes};
        uint64_t* const full = &ring_.full[place_.stage];
        const bool ragged = clears && at.w + brick.w > w.w.hi;
        barrier_wait(&ring_.empty[place_.stage], place_.phase ^ 1);
        __syncwarp();  // no lane is a whole round behind: to it two phases would look like none
        load_brick(tile, map_, w, head, row, behind, at, {w.t.hi, w.h.hi, w.w.hi}, brick, ragged ? landed_ : full);
        if (!ragged) continue;
        barrier_wait(landed_, landings_);
        landings_ ^= 1;
        clear_behind(tile, brick.w, w.w.hi - at.w);
        if (threadIdx.x % 32 == 0) barrier_arrive(full);
      }
    }
  }
};

// ---- a block's tiles ----------------------------------------------------------------------------------------
// Block b: tiles b % programs, + programs, ... of head b / programs. describe(plane, tile) and run() for each of them.
// next: the block's next tile, in shared memory since registers are few; thread 0 begins with first_tile().
__device__ __forceinline__ int first_tile(const Cut& cut) {
  return static_cast<int>(blockIdx.x % static_cast<unsigned>(cut.programs));
}
template <class Describe, class Run>
__device__ __forceinline__ void each_tile(const AttentionParams& p, const Cut& cut, int& next, Describe&& describe,
                                          Run&& run) {
  while (next < tiles_of(p, cut)) {
    describe(static_cast<int>(blockIdx.x / static_cast<unsigned>(cut.programs)), next);
    __syncthreads();
    if (threadIdx.x == 0) next += static_cast<int>(cut.programs);
    run();
    __syncthreads();  // before the next tile is described
  }
}
__device__ __forceinline__ void nothing(int, int) {}  // producers have too few registers to describe a tile

// ---- the host ---------------------------------------------------------------------------------------------
// (D, heads, tokens, batch), in boxes of a run of tokens of one head.
template <class Tile>
TensorMap map_of(const AttentionParams& p, const void* t, const int64_t (&stride)[3], int64_t tokens, int64_t heads,
                 int run, const char* op) {
  TensorShape s{t,
                static_cast<DType>(p.dtype),
                4,
                {p.head_dim, heads, tokens, p.cu_q ? 1 : p.batch},
                {1, stride[2], stride[1], stride[0]},
                {Tile::span, 1, run, 1},
                Tile::swizzle};
  for (int d = 1; d < s.rank; ++d) {
    if (s.dims[d] == 1) s.strides[d] = p.head_dim;  // of no meaning, but it must be one
    if (s.strides[d] <= 0 || s.strides[d] >= int64_t{1} << 39)
      throw std::invalid_argument(std::string(op) + ": a stride of the Hopper kernel's tensor map; got " +
                                  std::to_string(s.strides[d]) + " for " + sizes(p) +
                                  ", expected 1 to 2^39 - 1; copy the tensor");
  }
  return encode(s, op, sizes(p));
}

// Calls run<T, D>(...) for the dtype, and for the least D that holds a head.
#define FASTDIT_HOPPER_DTYPE(T, p, run, ...)              \
  if ((p).head_dim <= 64) return run<T, 64>(__VA_ARGS__); \
  if ((p).head_dim <= 96) return run<T, 96>(__VA_ARGS__); \
  return run<T, 128>(__VA_ARGS__);
#define FASTDIT_HOPPER(p, run, ...)                   \
  if (static_cast<DType>((p).dtype) == DType::bf16) { \
    FASTDIT_HOPPER_DTYPE(bf16, p, run, __VA_ARGS__)   \
  }                                                   \
  FASTDIT_HOPPER_DTYPE(f16, p, run, __VA_ARGS__)

}  // namespace fastdit::cuda
