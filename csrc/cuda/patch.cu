// patch_embed3d forward: y[n, d] = sum_k patch(n)[k] W[d, k] + bias[d] + pos[n, d],   k = (c, dt, dh, dw)
//
// A block owns 128 tokens: their patches are gathered to shared memory once and stay there while slabs of 64 or 128
// outputs pass, W[slab, K] from L2 by cp.async, one slab ahead. No matrix of patches is stored: memory sees x once, and
// y once, from registers in 16-byte stores. A list of videos is one launch; a tile is of one video. Where patches and a
// slab do not fit together, both come in chunks of K.
#include "patch.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kTokens = 128, kThreads = 256, kColumns = 64;  // the least slab: warps stand 4 x 2, 32 x 32 each

struct Embed {
  const void *weight, *bias;
  void* y;
  int64_t weight_stride[5];
  int D, K, bias_dtype, pos_dtype;
  int x_width, weight_width;  // values of a pack
  int chunk, chunks;          // of K
  int slab, per, parts;       // outputs of a slab; slabs of a block, blocks of a tile
  int wide;                   // packs of 16 bytes of y, bias and pos
};

// The output that row r of a slab's panel holds. Rows are permuted in groups of 32, so that what a lane has of four
// products, two columns each, is eight neighbouring outputs.
__device__ __forceinline__ int output_of(int r) { return (r & ~31) + r % 8 / 2 * 8 + r / 8 % 4 * 2 + r % 2; }

// Shared memory: panels of patches, panels of weights, then tables.
template <class T>
struct Layout {
  int pitch, a_panels;
  size_t b, tables, bytes;
  __host__ __device__ Layout(int chunk, int chunks, int slab, int packs)
      : pitch(Panel<T>::pitch_of(chunk)),
        a_panels(chunks > 1 ? 2 : 1),
        b(sizeof(T) * pitch * kTokens * a_panels),
        tables(b + sizeof(T) * pitch * slab * 2),
        bytes(tables + sizeof(int64_t) * (kTokens + packs)) {}
};

template <class TX, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    patch_embed_kernel(const __grid_constant__ Videos videos, const __grid_constant__ Embed p) {
  FASTDIT_SHARED_DYNAMIC(bytes, 16);
  const int x_packs = p.K / p.x_width, weight_packs = p.K / p.weight_width;
  const Layout<T> layout(p.chunk, p.chunks, p.slab, 0);
  T *const a_panels = reinterpret_cast<T*>(bytes), *const b_panels = reinterpret_cast<T*>(bytes + layout.b);
  int64_t* const positions = reinterpret_cast<int64_t*>(bytes + layout.tables);
  int64_t *const x_offset = positions + kTokens, *const weight_offset = x_offset + x_packs;

  const int tile = static_cast<int>(blockIdx.x) / p.parts, part = static_cast<int>(blockIdx.x) % p.parts;
  const Video& v = video_of(videos, tile);
  const int row0 = (tile - v.first_tile) * kTokens, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < x_packs; i += kThreads) x_offset[i] = inside(videos, v.stride + 1, i * p.x_width);
  for (int i = thread; i < weight_packs; i += kThreads)
    weight_offset[i] = inside(videos, p.weight_stride + 1, i * p.weight_width);
  if (v.rows && thread < kTokens && row0 + thread < v.count) positions[thread] = Token(v, row0 + thread).row(v);
  __syncthreads();

  const int first = part * p.per, slabs = min((p.D + p.slab - 1) / p.slab - first, p.per), steps = slabs * p.chunks;
  const auto a_panel = [&](int i) {
    return Panel<T>{a_panels + (p.chunks > 1 ? i % 2 : 0) * kTokens * layout.pitch, layout.pitch};
  };
  const auto b_panel = [&](int i) { return Panel<T>{b_panels + i % 2 * p.slab * layout.pitch, layout.pitch}; };
  const auto depth_of = [&](int k) {
    const int rest = (p.K - k + Panel<T>::kStep - 1) / Panel<T>::kStep * Panel<T>::kStep;
    return min(rest, p.chunk);
  };
  const auto issue = [&](int i) {
    const int k = i % p.chunks * p.chunk, depth = depth_of(k);
    if (p.chunks > 1 || i == 0) {
      const TX* x = static_cast<const TX*>(v.x);
      const int64_t* offset = x_offset + k / p.x_width;
      stage<true>(
          a_panel(i), kTokens, depth / p.x_width, (p.K - k) / p.x_width, p.x_width, x,
          [&](int r) { return row0 + r < v.count ? x + Token(v, row0 + r).corner(videos, v) : nullptr; },
          [&](int pack) { return offset[pack]; });
    }
    const T* weight = static_cast<const T*>(p.weight);
    const int64_t* offset = weight_offset + k / p.weight_width;
    const int d0 = (first + i / p.chunks) * p.slab;
    stage<false>(
        b_panel(i), p.slab, depth / p.weight_width, (p.K - k) / p.weight_width, p.weight_width, weight,
        [&](int r) {
          const int d = d0 + output_of(r);
          return d < p.D ? weight + d * p.weight_stride[0] : nullptr;
        },
        [&](int pack) { return offset[pack]; });
  };

  const int warp = thread / 32, lane = thread % 32, rows = warp / 2 * 32, columns = warp % 2 * 32;
  // What a lane has of a product: eight neighbouring outputs, from d on, of four tokens.
  const auto store = [&](const float (&sum)[2][4][4], int d) {
    float bias[8] = {};
    if (p.bias) {
      if (p.wide && d < p.D) load_parameter<8, TX>(p.bias, p.bias_dtype, d, bias);
      if (!p.wide) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float one[1] = {};
          if (d + c < p.D) load_parameter<1, TX>(p.bias, p.bias_dtype, d + c, one);
          bias[c] = one[0];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = rows + 8 * i + lane / 4;
      if (row0 + r >= v.count || d >= p.D) continue;
      TX* y = static_cast<TX*>(p.y) + (v.first_row + row0 + r) * p.D + d;
      float out[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) out[c] = sum[i / 2][c / 2][i % 2 * 2 + c % 2] + bias[c];
      if (p.wide) {
        float pos[8] = {};
        if (v.rows) load_parameter<8, TX>(v.rows, p.pos_dtype, positions[r] + d, pos);
#pragma unroll
        for (int c = 0; c < 8; ++c) out[c] += pos[c];
        store_once(y, narrow<TX, 8>(out));
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (d + c >= p.D) continue;
          float pos[1] = {};
          if (v.rows) load_parameter<1, TX>(v.rows, p.pos_dtype, positions[r] + d + c, pos);
          store_once(y + c, narrow<TX, 1>({out[c] + pos[0]}));
        }
      }
    }
  };

  float sum[2][4][4];
  pipeline(steps, issue, [&](int i) {
    const int chunk = i % p.chunks, d0 = (first + i / p.chunks) * p.slab;
    if (row0 + rows >= v.count) return;
    for (int c = columns; c < p.slab && d0 + c < p.D; c += kColumns) {  // once where there are several chunks
      if (chunk == 0) {
#pragma unroll
        for (int e = 0; e < 32; ++e) sum[e / 16][e / 4 % 4][e % 4] = 0;
      }
      multiply<Along::inner, Along::inner>(sum, a_panel(i).template from<Along::inner>(rows),
                                           b_panel(i).template from<Along::inner>(c), depth_of(chunk * p.chunk));
      if (chunk == p.chunks - 1) store(sum, d0 + c + lane % 4 * 8);
    }
  });
}

template <class TX, class T>
void run(const PatchEmbedParams& p, Stream stream, const char* op) {
  const int K = static_cast<int>(p.channels * p.patch[0] * p.patch[1] * p.patch[2]), D = static_cast<int>(p.dim);
  const int64_t size[4] = {p.channels, p.patch[0], p.patch[1], p.patch[2]};
  Embed e{p.weight, p.bias, p.y, {}, D, K, p.bias_dtype, p.pos_dtype, 0, 0, 0, 1, kColumns, 0, 0, 0};
  for (int d = 0; d < 5; ++d) e.weight_stride[d] = p.weight_stride[d];
  e.weight_width = pack_width(p.weight, sizeof(T), size, p.weight_stride + 1, {p.weight_stride[0]});
  const int item = static_cast<int>(sizeof(TX));
  e.wide = D % 8 == 0 && fits(p.y, item, 8, {}) &&
           fits(p.bias, static_cast<int>(itemsize(static_cast<DType>(p.bias_dtype))), 8, {});
  for (int64_t i = 0; i < p.num_items; ++i)
    e.wide = e.wide && fits(p.items[i].pos, static_cast<int>(itemsize(static_cast<DType>(p.pos_dtype))), 8,
                            {p.items[i].pos_stride[0], p.items[i].pos_stride[1]});

  const int limit = shared_limit(stream.device);
  each_launch(p, kTokens, op, [&](const Videos& v, int x_width, int tiles) {
    e.x_width = x_width;
    const int packs = K / x_width + K / e.weight_width;
    const auto shared = [&](int chunk, int chunks, int slab) {
      return static_cast<int>(Layout<T>(chunk, chunks, slab, packs).bytes);
    };
    const int whole = (K + Panel<T>::kStep - 1) / Panel<T>::kStep * Panel<T>::kStep;
    e.chunk = whole, e.chunks = 1;
    if (shared(whole, 1, kColumns) > limit)
      e.chunk = 128 / static_cast<int>(sizeof(T)), e.chunks = (K - 1) / e.chunk + 1;
    // three blocks on a processor hide what one waits for
    e.slab = e.chunks == 1 && D > kColumns && 3 * shared(whole, 1, 2 * kColumns) <= limit ? 2 * kColumns : kColumns;
    const int slabs = (D + e.slab - 1) / e.slab;
    // enough blocks for the card; beyond that a block keeps its patches for all outputs
    const int wanted = (4 * processors(stream.device) + tiles - 1) / tiles, parts = wanted < slabs ? wanted : slabs;
    e.per = (slabs + parts - 1) / parts, e.parts = (slabs + e.per - 1) / e.per;
    launch(patch_embed_kernel<TX, T>, dim3(static_cast<unsigned>(tiles) * e.parts), dim3(kThreads),
           shared(e.chunk, e.chunks, e.slab), stream, op, sizes(p), v, e);
  });
}

}  // namespace

void patch_embed3d_forward(const PatchEmbedParams& p, Stream stream, const char* op) {
  FASTDIT_DTYPES(p.dtype, p.weight_dtype, run, p, stream, op)
}

}  // namespace fastdit::cuda
