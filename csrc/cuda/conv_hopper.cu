// Causal 3-D convolution on Hopper (sm_90a), bf16 and fp16: the sums of conv.cu by wgmma, x and weights by the copy
// engine.
//
// A tile is 128 or 256 pixels, rectangles of lines x columns in one or more neighbouring output frames, by N of Cout.
// Two warpgroups own half of the pixels each; one thread of a third feeds them through two rings:
//   patch    64 channels of the pixels that one column of the kernel's taps meets in one frame: a box of the tensor map
//            of x or of the cache. What lies outside of the video is the copy engine's zero fill: padding costs
//            nothing.
//   weights  64 channels of N filters, one tap.
// The taps of a column read their patch shifted by whole lines. A line is a multiple of 8 pixels of 128 bytes, so each
// shift lands on the swizzle's pattern of 1024 bytes, and no descriptor needs a base offset. Other columns are patches
// of their own: L2 sees 3 (lines + 2) / lines reads of x at 3x3 instead of 9.
//
// K runs over (frame of the kernel, its column, 64 channels, its line) in every tile: the bits of a pixel depend
// neither on the tile nor on how a video was cut into chunks. Blocks are persistent: the next tile is on its way while
// one is stored.
//
// Two blocks of a cluster take neighbouring tiles of one plane and of the same N, so their weights are the same step
// for step: each asks L2 for half of the filters and has them sent to both. A stage is full when both halves are there,
// and empty when the consumers of both blocks have said so to both producers. The last tile of an odd plane has a
// neighbour below the frame: zeros for pixels, and nothing to store.
#include <algorithm>

#include "conv_hopper.cuh"
#include "mma.h"
#include "ring.h"
#include "wgmma.h"

#if defined(__CUDACC__)
#pragma nv_diag_suppress 177  // other architectures refer to little of this
#endif

namespace fastdit::cuda {
namespace {

struct Maps {
  TensorMap x, cache, taps;
};

// Lane q of four has words k of its own; then it has word q of lane k. Its own inverse.
__device__ __forceinline__ void transpose(uint32_t (&words)[4], int q) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = q & step;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & step) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[k] : words[k + step], step);
      words[k] = upper ? got : words[k], words[k + step] = upper ? words[k + step] : got;
    }
  }
}

template <class T, int N, int MI>
struct HopperBlock {
  static constexpr int WEIGHTS = N * kSpan;
  static_assert(N % 32 == 0);

  const Maps& maps;
  const ConvParams& p;
  const HopperPlan& plan;
  char* const bytes;
  const int C, frame_bytes, patch_bytes, rank;

  __device__ HopperBlock(const Maps& m, const ConvParams& params, const HopperPlan& how, char* shared)
      : maps(m),
        p(params),
        plan(how),
        bytes(shared),
        C(static_cast<int>(p.cin)),
        frame_bytes((how.patch_lines << how.columns) * kSpan),
        patch_bytes(frame_bytes << how.frames),
        rank(how.peers > 1 ? cluster_rank() : 0) {}

  __device__ __forceinline__ char* patch(int i) const { return bytes + i * patch_bytes; }
  __device__ __forceinline__ char* weights(int i) const { return patch(plan.patches) + i * WEIGHTS; }
  // patches full, patches empty, weights full, weights empty
  __device__ __forceinline__ uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(weights(plan.stages)); }
  __device__ __forceinline__ uint64_t* patch_full(int i) const { return barriers() + i; }
  __device__ __forceinline__ uint64_t* patch_empty(int i) const { return barriers() + kMostPatches + i; }
  __device__ __forceinline__ uint64_t* full(int i) const { return barriers() + 2 * kMostPatches + i; }
  __device__ __forceinline__ uint64_t* empty(int i) const { return barriers() + 2 * kMostPatches + kMostStages + i; }
  __device__ __forceinline__ float* bias() const {
    return reinterpret_cast<float*>(barriers() + 2 * (kMostPatches + kMostStages));
  }

  __device__ __forceinline__ void prepare() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
#pragma unroll 1
      for (int i = 0; i < plan.patches; ++i)
        barrier_init(patch_full(i), 1), barrier_init(patch_empty(i), kConsumers / 32);
#pragma unroll 1
      for (int i = 0; i < plan.stages; ++i)
        barrier_init(full(i), 1), barrier_init(empty(i), plan.peers * kConsumers / 32);
      barrier_fence_init();
    }
#pragma unroll 1
    for (int i = thread; i < plan.bias; i += kThreads) {
      float v[1] = {0};
      if (p.bias && i < p.cout) load_as<1>(p.bias, p.bias_dtype, i, v);
      bias()[i] = v[0];
    }
    __syncthreads();
    if (plan.peers > 1) cluster_barrier();  // before a copy or an arrival comes from the peer
  }
  // After all of a block's work: until here its peer signals it.
  __device__ __forceinline__ void leave() const {
    if (plan.peers > 1) cluster_barrier();
  }

  // First output pixel and Cout of a tile; first_t: frame of tap 0 of its first frame.
  struct Place {
    int b, t, h, w, n, first_t;
  };
  __device__ __forceinline__ Place place(int tile) const {
    Place at;
    at.n = tile % plan.tiles_n * N, tile /= plan.tiles_n;
    const int of_plane = tile % plan.places * plan.peers + rank;
    at.w = of_plane % plan.tiles_w << plan.columns, at.h = of_plane / plan.tiles_w << plan.lines, tile /= plan.places;
    at.t = tile % plan.tiles_t << plan.frames, at.b = tile / plan.tiles_t;
    at.first_t = at.t * static_cast<int>(p.stride[0]) - static_cast<int>(p.pad_t);
    return at;
  }
  // The frame of cat(cache, x) that tap t of the tile's frame j meets; -1: none.
  __device__ __forceinline__ int frame(const Place& at, int t, int j) const {
    const int frames = static_cast<int>(p.cache_t + p.t);
    const int i = at.first_t + j * static_cast<int>(p.stride[0]) + t * static_cast<int>(p.dilation[0]);
    if (at.t + j >= p.to) return -1;
    if (p.time_pad != static_cast<int>(Pad::zeros)) return min(max(i, 0), frames - 1);
    return i >= 0 && i < frames ? i : -1;
  }
  __device__ __forceinline__ bool meets(const Place& at, int t) const {
#pragma unroll 1
    for (int j = 0; j < 1 << plan.frames; ++j)
      if (frame(at, t, j) >= 0) return true;
    return false;
  }

  // Patches of a tile.
  __device__ __forceinline__ int patches_of(const Place& at) const {
    int frames = 0;
#pragma unroll 1
    for (int t = 0; t < p.kernel[0]; ++t) frames += meets(at, t);
    return frames * static_cast<int>(p.kernel[2]) * ((C + kChannels - 1) / kChannels) *
           (static_cast<int>(p.kernel[1]) / plan.shared);
  }

  // ---- the copies ---------------------------------------------------------------------------------------------
  __device__ __forceinline__ int tap(int axis, int i) const {
    return plan.flipped[axis] ? static_cast<int>(p.kernel[axis]) - 1 - i : i;
  }
  __device__ __forceinline__ void load_patch(const Place& at, int t, int h, int w, int c, int to) const {
    barrier_arrive_expect(patch_full(to), patch_bytes);
    const int first_h = at.h - static_cast<int>(p.pad_h) + h * static_cast<int>(p.dilation[1]);
    const int first_w = at.w - static_cast<int>(p.pad_w) + w * static_cast<int>(p.dilation[2]);
#pragma unroll 1
    for (int j = 0; j < 1 << plan.frames; ++j) {
      const int i = frame(at, t, j), cached = static_cast<int>(p.cache_t);
      const bool old = i >= 0 && i < cached;
      // a frame that does not exist is one beyond the last
      const int corner[5] = {c, first_w, first_h, i < 0 ? static_cast<int>(p.t) : old ? i : i - cached, at.b};
      tensor_load(patch(to) + j * frame_bytes, old ? maps.cache : maps.x, corner, patch_full(to));
    }
  }
  // Its part of N filters of a tap.
  __device__ __forceinline__ void load_weights(const Place& at, int t, int h, int w, int c, int to) const {
    barrier_arrive_expect(full(to), WEIGHTS);  // of all parts
    const int corner[5] = {c, at.n + rank * (N / 2), tap(2, w), tap(1, h), tap(0, t)};
    char* const part = weights(to) + rank * (WEIGHTS / 2);
    if (plan.peers > 1)
      tensor_load_peers(part, maps.taps, corner, full(to), 3);
    else
      tensor_load(part, maps.taps, corner, full(to));
  }
  __device__ __forceinline__ int first_tile() const { return static_cast<int>(blockIdx.x) / plan.peers; }
  __device__ __forceinline__ int tile_step() const { return static_cast<int>(gridDim.x) / plan.peers; }

  __device__ __forceinline__ void produce() const {
    RingPlace<> patches, stages;
    for (int tile = first_tile(); tile < plan.tiles; tile += tile_step()) {
      const Place at = place(tile);
#pragma unroll 1
      for (int t = 0; t < p.kernel[0]; ++t) {
        if (!meets(at, t)) continue;
#pragma unroll 1
        for (int w = 0; w < p.kernel[2]; ++w)
#pragma unroll 1
          for (int c = 0; c < C; c += kChannels)
#pragma unroll 1
            for (int h = 0; h < p.kernel[1]; h += plan.shared) {
              barrier_wait(patch_empty(patches.stage), patches.phase ^ 1);
              load_patch(at, t, h, w, c, patches.stage);
              patches.next(plan.patches);
#pragma unroll 1
              for (int line = h; line < h + plan.shared; ++line) {
                barrier_wait(empty(stages.stage), stages.phase ^ 1);
                load_weights(at, t, line, w, c, stages.stage);
                stages.next(plan.stages);
              }
            }
      }
    }
  }

  // ---- the products -------------------------------------------------------------------------------------------
  // Pixel m of the tile.
  struct Pixel {
    int t, h, w;
  };
  __device__ __forceinline__ Pixel pixel(const Place& at, int m) const {
    const int line = m >> plan.columns;
    return {at.t + (line >> plan.lines), at.h + (line & ((1 << plan.lines) - 1)),
            at.w + (m & ((1 << plan.columns) - 1))};
  }
  __device__ __forceinline__ bool exists(const Pixel& i) const { return i.t < p.to && i.h < p.ho && i.w < p.wo; }

  // By each warp.
  __device__ __forceinline__ void release(int stage, int lane) const {
    if (plan.peers > 1) {
      if (lane < 2) barrier_arrive_at(peer_address(empty(stage), lane));
    } else if (lane == 0) {
      barrier_arrive(empty(stage));
    }
  }
  __device__ __forceinline__ void consume() const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int first = warp / 4 * MI * kMatrix;  // pixel of this warpgroup
    RingPlace<> patches, stages;
    float sum[MI][N / 2];
    int offset[MI];  // of a matrix in a patch, bytes
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      const int m = first + i * kMatrix, in_frame = plan.columns + plan.lines;
      offset[i] = (m >> in_frame) * frame_bytes + (m & ((1 << in_frame) - 1)) * kSpan;
    }
    const int shift = (static_cast<int>(p.dilation[1]) << plan.columns) * kSpan;  // from a tap of a column to the next
    const int groups = static_cast<int>(p.kernel[1]) / plan.shared;               // patches of a column

    for (int tile = first_tile(); tile < plan.tiles; tile += tile_step()) {
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int k = 0; k < N / 2; ++k) sum[i][k] = 0;
      int read_patch = -1, read_stage = -1;  // by the products before those under way
      int c = 0, group = 0;
      for (int left = patches_of(place(tile)); left > 0; --left) {
        barrier_wait(patch_full(patches.stage), patches.phase);
        uint64_t x = matrix(patch(patches.stage), 16, 1024, 1);
        for (int line = 0; line < plan.shared; ++line) {
          barrier_wait(full(stages.stage), stages.phase);
          multiply(sum, x, matrix(weights(stages.stage), 16, 1024, 1), offset, C - c);
          product_wait<1>();
          if (read_stage >= 0) {
            release(read_stage, lane);
            if (line == 0 && lane == 0) barrier_arrive(patch_empty(read_patch));
          }
          read_stage = stages.stage, x += shift >> 4;
          stages.next(plan.stages);
        }
        read_patch = patches.stage;
        patches.next(plan.patches);
        if (++group == groups) {
          group = 0;
          if ((c += kChannels) >= C) c = 0;
        }
      }
      product_wait<0>();
#pragma unroll
      for (int i = 0; i < MI; ++i) product_values(sum[i]);
      if (read_stage >= 0) {
        release(read_stage, lane);
        if (lane == 0) barrier_arrive(patch_empty(read_patch));
      }
      finish(place(tile), sum, first + warp % 4 * 16);
    }
  }

  // One step, of `left` channels or kChannels.
  static __device__ __forceinline__ void multiply(float (&sum)[MI][N / 2], uint64_t x, uint64_t w,
                                                  const int (&offset)[MI], int left) {
    if (left >= kChannels) {
      product_fence();
#pragma unroll
      for (int k = 0; k < kChannels / 16; ++k)
#pragma unroll
        for (int i = 0; i < MI; ++i) product<T>(sum[i], x + ((offset[i] + k * 32) >> 4), w + (k * 32 >> 4));
      product_commit();
      return;
    }
#pragma unroll 1
    for (; left > 0; left -= 16, x += 32 >> 4, w += 32 >> 4) {
      product_fence();
#pragma unroll
      for (int i = 0; i < MI; ++i) product<T>(sum[i], x + (offset[i] >> 4), w);
      product_commit();
    }
  }

  // ---- the way out --------------------------------------------------------------------------------------------
  // Eight columns of a row of y or of the residual, as far as there are so many: a pack, or values that a stride
  // parts.
  __device__ __forceinline__ void load(uint32_t (&words)[4], const T* row, int n, int64_t stride) const {
    if (plan.packs) {
      if (n >= p.cout) return;
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(row + n));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      return;
    }
#pragma unroll 1
    for (int e = 0; e < 8 && n + e < p.cout; ++e) {
      const uint32_t v = static_cast<uint32_t>(row[(n + e) * stride].bits) << e % 2 * 16;
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] |= e / 2 == k ? v : 0;
    }
  }
  __device__ __forceinline__ void store(T* row, const uint32_t (&words)[4], int n, int64_t stride) const {
    if (plan.packs) {
      if (n < p.cout) __stcs(reinterpret_cast<uint4*>(row + n), uint4{words[0], words[1], words[2], words[3]});
      return;
    }
#pragma unroll 1
    for (int e = 0; e < 8 && n + e < p.cout; ++e) {
      const uint32_t word = e < 4 ? e < 2 ? words[0] : words[1] : e < 6 ? words[2] : words[3];
      row[(n + e) * stride].bits = static_cast<uint16_t>(word >> e % 2 * 16);
    }
  }

  // Eight columns are 16 bytes of the four threads of a row; of four times eight each thread loads and stores one.
  __device__ __forceinline__ void finish(const Place& at, const float (&sum)[MI][N / 2], int first_row) const {
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int lane = opaque(static_cast<int>(threadIdx.x) % 32), q = lane % 4;  // for registers
        const Pixel to = pixel(at, first_row + i * kMatrix + half * 8 + lane / 4);
        const bool there = exists(to);
        const auto start = [&](const int64_t (&stride)[kAxes]) {
          return at.b * stride[0] + to.t * stride[2] + to.h * stride[3] + to.w * stride[4];
        };
        T* const y = static_cast<T*>(p.y) + start(p.y_stride);
        const T* const residual = static_cast<const T*>(p.residual) + (p.residual ? start(p.residual_stride) : 0);
#pragma unroll
        for (int j = 0; j < N / 8; j += 4) {
          const int mine = at.n + (j + q) * 8;
          uint32_t words[4] = {};
          if (p.residual) {
            if (there) load(words, residual, mine, p.residual_stride[1]);
            transpose(words, q);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 b = *reinterpret_cast<const float2*>(bias() + at.n + (j + k) * 8 + 2 * q);
            const int s = (j + k) * 4 + half * 2;
            const T low{static_cast<uint16_t>(words[k])}, high{static_cast<uint16_t>(words[k] >> 16)};
            words[k] = pair<T>(sum[i][s] + b.x + to_float(low), sum[i][s + 1] + b.y + to_float(high));
          }
          transpose(words, q);
          if (there) store(y, words, mine, p.y_stride[1]);
        }
      }
  }
};

template <class T, int N, int MI>
__global__ void __launch_bounds__(kThreads, 1)
    conv_hopper_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ConvParams p,
                       const __grid_constant__ HopperPlan plan) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTDIT_SHARED_DYNAMIC(bytes, 1024);
  const HopperBlock<T, N, MI> block(maps, p, plan, bytes);
  block.prepare();
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) block.produce();
  } else {
    more_registers<kConsumerRegisters>();
    block.consume();
  }
  block.leave();
#endif
}

// ---- the host -----------------------------------------------------------------------------------------------
template <class T, int N, int MI>
void start(const ConvParams& p, const ConvTaps& taps, HopperPlan plan, Stream stream, const char* op) {
  const std::string of = sizes(p);
  const int width = 1 << plan.columns;
  const auto video = [&](const void* data, int64_t frames, const int64_t (&stride)[kAxes]) {
    return video_map(data, p.dtype, {p.n, p.cin, frames, p.h, p.w}, stride, width, plan.patch_lines, op, of);
  };
  Maps maps;
  maps.x = video(p.x, p.t, p.x_stride);
  maps.cache = p.cache_t ? video(p.cache, p.cache_t, p.cache_stride) : maps.x;
  TensorShape filters{taps.data,
                      static_cast<DType>(p.dtype),
                      5,
                      {p.cin, p.cout, p.kernel[2], p.kernel[1], p.kernel[0]},
                      {1, taps.n, taps.w, taps.h, taps.t},
                      {kChannels, N / plan.peers, 1, 1, 1},
                      Swizzle::b128};
  for (int d = 1; d < 5; ++d) {
    int64_t& stride = filters.strides[d];
    if (stride >= 0) continue;
    filters.base = static_cast<const T*>(filters.base) + (filters.dims[d] - 1) * stride, stride = -stride;
    plan.flipped[4 - d] = 1;
  }
  maps.taps = encode(filters, op, of);
  plan.packs = p.cout % 8 == 0 && packed(p.y, p.y_stride, sizeof(T)) &&
               (!p.residual || packed(p.residual, p.residual_stride, sizeof(T)));
  const size_t shared = size_t(plan.patches) * (plan.patch_lines << plan.columns << plan.frames) * kSpan +
                        size_t(plan.stages) * N * kSpan + 2 * (kMostPatches + kMostStages) * 8 + plan.bias * 4;
  const auto kernel = conv_hopper_kernel<T, N, MI>;
  const int clusters = std::min(plan.tiles, std::max(processors(stream.device) / plan.peers, 1));
  const dim3 grid(clusters * plan.peers), block(kThreads);
  if (plan.peers > 1)
    launch_clusters(plan.peers, kernel, grid, block, shared, stream, op, of, maps, p, plan);
  else
    launch(kernel, grid, block, shared, stream, op, of, maps, p, plan);
}

template <class T>
void run(const ConvParams& p, const ConvTaps& taps, int peers, Stream stream, const char* op) {
  const HopperChoice& best = hopper_choice(p, peers, stream.device, op);
  switch (best.columns) {
    case 192:
      return start<T, 192, 2>(p, taps, best.plan, stream, op);
    case 128:
      return start<T, 128, 2>(p, taps, best.plan, stream, op);
    case 96:
      return start<T, 96, 2>(p, taps, best.plan, stream, op);
    default:
      return start<T, 64, 1>(p, taps, best.plan, stream, op);
  }
}

}  // namespace

void conv_forward_hopper(const ConvParams& given, const ConvTaps& taps, int peers, Stream stream, const char* op) {
  const ConvParams p = conv_checked(given, taps, op);
  if (static_cast<DType>(p.dtype) == DType::bf16)
    run<bf16>(p, taps, peers, stream, op);
  else
    run<f16>(p, taps, peers, stream, op);
}

}  // namespace fastdit::cuda
