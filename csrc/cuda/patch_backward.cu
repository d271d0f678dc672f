// Gradients of patch_embed3d, two products with the patches scattered or gathered on the way, and the sums over splits.
//
//   dx[patch(n)][k] = sum_d g[n, d] W[d, k]
//     A block owns 128 tokens and up to 128 of K, and walks d: g is read once where K <= 128. Patches do not overlap,
//     so each value is stored once.
//   dW[d, k] = sum_n g[n, d] patch(n)[k],   db[d] = sum_n g[n, d]
//     A block owns 128 outputs, up to 128 of K and a split of the tokens, and writes fp32 partials; patch_sum adds
//     those in the order of the splits: no atomics, the same bits every time.
#include "patch.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kSide = 128, kThreads = 256, kColumns = 64, kGroups = kSide / kColumns;  // warps stand 4 x 2
constexpr int kQuarters = 4;  // of the threads, that sum rows of g for the bias
template <class T>
constexpr int kInner = 128 / sizeof(T);  // of the inner dimension a stage: 64 of 16 bits, 32 of fp32

struct EmbedGrad {
  const void *weight, *grad;
  int64_t weight_stride[5];
  int D, K;
  int columns, k_tiles;                   // of K: of a block, blocks
  int x_width, weight_width, grad_width;  // values of a pack
  int pairs;                              // neighbours of K are neighbours in x; dw: in partial
  // dw: a split's row of partial holds (D, K), then (D); what is not needed is not written
  int need_weight, need_bias, tiles, per, first_split;
  int64_t pitch;
  float* partial;
};

// One stage of a panel of 128 rows, one of `b_rows`, two of each; then tables.
template <class T>
struct Layout {
  int a_pitch, b_pitch;
  size_t b, tables, bytes;
  __host__ __device__ Layout(int a_rows, int a_width, int b_rows, int b_width, int table)
      : a_pitch(Panel<T>::pitch_of(a_width)),
        b_pitch(Panel<T>::pitch_of(b_width)),
        b(sizeof(T) * a_pitch * a_rows * 2),
        tables(b + sizeof(T) * b_pitch * b_rows * 2),
        bytes(tables + sizeof(int64_t) * table) {}
};

using SumsOfWarp = float[kGroups][2][4][4];

// f(row, column, group, i, j, e) for the pairs of sums of a lane; the second is at e + 1.
template <class F>
__device__ __forceinline__ void each_pair(F&& f) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          f(warp / 2 * 32 + 16 * i + 4 * e + lane / 4, g * kColumns + warp % 2 * 32 + 8 * j + lane % 4 * 2, g, i, j, e);
}

// d += A B: the columns of all groups that begin before `columns`.
template <Along along_a, class T>
__device__ __forceinline__ void multiply_groups(SumsOfWarp& d, const Panel<T>& A, const Panel<T>& B, int columns,
                                                int depth) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    if (const int c = g * kColumns + warp % 2 * 32; c < columns)
      multiply<along_a, Along::outer>(d[g], A.template from<along_a>(warp / 2 * 32), B.template from<Along::outer>(c),
                                      depth);
}

__device__ __forceinline__ int up(int n, int step) { return (n + step - 1) / step * step; }

// ---- dx ----------------------------------------------------------------------------------------------------
template <class TX, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    patch_dx_kernel(const __grid_constant__ Videos videos, const __grid_constant__ EmbedGrad p) {
  FASTDIT_SHARED_DYNAMIC(bytes, 16);
  constexpr int inner = kInner<T>;
  const Layout<T> layout(kSide, inner, inner, p.columns, 0);
  int64_t* const corners = reinterpret_cast<int64_t*>(bytes + layout.tables);
  int64_t *const x_offset = corners + kSide, *const weight_offset = x_offset + p.columns;

  const int tile = static_cast<int>(blockIdx.x) / p.k_tiles, k0 = static_cast<int>(blockIdx.x) % p.k_tiles * p.columns;
  const Video& v = video_of(videos, tile);
  const int row0 = (tile - v.first_tile) * kSide, thread = static_cast<int>(threadIdx.x);
  const int wanted = min(p.K - k0, p.columns);
  if (thread < wanted) {
    x_offset[thread] = inside(videos, v.stride + 1, k0 + thread);
    weight_offset[thread] = inside(videos, p.weight_stride + 1, k0 + thread);
  }
  if (thread < kSide && row0 + thread < v.count) corners[thread] = Token(v, row0 + thread).corner(videos, v);
  __syncthreads();

  const auto a_panel = [&](int i) {
    return Panel<T>{reinterpret_cast<T*>(bytes) + i % 2 * kSide * layout.a_pitch, layout.a_pitch};
  };
  const auto b_panel = [&](int i) {
    return Panel<T>{reinterpret_cast<T*>(bytes + layout.b) + i % 2 * inner * layout.b_pitch, layout.b_pitch};
  };
  const TX* grad = static_cast<const TX*>(p.grad) + (v.first_row + row0) * p.D;
  const T* weight = static_cast<const T*>(p.weight);
  const auto issue = [&](int i) {
    const int d0 = i * inner;
    stage<false>(
        a_panel(i), kSide, inner / p.grad_width, (p.D - d0) / p.grad_width, p.grad_width, grad,
        [&](int r) { return row0 + r < v.count ? grad + int64_t{r} * p.D + d0 : nullptr; },
        [&](int pack) { return pack * p.grad_width; });
    stage<false>(
        b_panel(i), inner, p.columns / p.weight_width, wanted / p.weight_width, p.weight_width, weight,
        [&](int r) { return d0 + r < p.D ? weight + (d0 + r) * p.weight_stride[0] : nullptr; },
        [&](int pack) { return weight_offset[pack * p.weight_width]; });
  };
  SumsOfWarp sum = {};
  pipeline((p.D + inner - 1) / inner, issue, [&](int i) {
    if (row0 + thread / 64 * 32 < v.count)
      multiply_groups<Along::inner>(sum, a_panel(i), b_panel(i), wanted,
                                    min(up(p.D - i * inner, Panel<T>::kStep), inner));
  });
  TX* x = static_cast<TX*>(const_cast<void*>(v.x));
  each_pair([&](int r, int c, int g, int i, int j, int e) {
    if (row0 + r >= v.count || c >= wanted) return;
    const float two[2] = {sum[g][i][j][e], sum[g][i][j][e + 1]};
    TX* at = x + corners[r] + x_offset[c];
    if (p.pairs) return store_once(at, narrow<TX, 2>(two));
    *at = from_float<TX>(two[0]);
    if (c + 1 < wanted) x[corners[r] + x_offset[c + 1]] = from_float<TX>(two[1]);
  });
}

// ---- dw ----------------------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    patch_dw_kernel(const __grid_constant__ Videos videos, const __grid_constant__ EmbedGrad p) {
  FASTDIT_SHARED_DYNAMIC(bytes, 16);
  FASTDIT_SHARED(float[kQuarters][kSide], column_sums);
  constexpr int inner = kInner<T>;
  const Layout<T> layout(inner, kSide, inner, p.columns, 0);
  int64_t* const x_offset = reinterpret_cast<int64_t*>(bytes + layout.tables);

  const int thread = static_cast<int>(threadIdx.x), split = static_cast<int>(blockIdx.y);
  const int d0 = static_cast<int>(blockIdx.x) / p.k_tiles * kSide;
  const int k0 = static_cast<int>(blockIdx.x) % p.k_tiles * p.columns, wanted = min(p.K - k0, p.columns);
  const int first = split * p.per, steps = min(p.tiles - first, p.per);
  const auto a_panel = [&](int i) {
    return Panel<T>{reinterpret_cast<T*>(bytes) + i % 2 * inner * layout.a_pitch, layout.a_pitch};
  };
  const auto b_panel = [&](int i) {
    return Panel<T>{reinterpret_cast<T*>(bytes + layout.b) + i % 2 * inner * layout.b_pitch, layout.b_pitch};
  };
  const Video* known = nullptr;  // whose offsets are in the table
  const auto issue = [&](int i) {
    const Video& v = video_of(videos, first + i);
    if (&v != known) {
      known = &v;  // the barrier before this step let everybody finish with the table
      if (thread < wanted) x_offset[thread] = inside(videos, v.stride + 1, k0 + thread);
      __syncthreads();
    }
    const int row0 = (first + i - v.first_tile) * inner;
    const T *grad = static_cast<const T*>(p.grad) + (v.first_row + row0) * p.D + d0, *x = static_cast<const T*>(v.x);
    stage<false>(
        a_panel(i), inner, kSide / p.grad_width, (p.D - d0) / p.grad_width, p.grad_width, grad,
        [&](int r) { return row0 + r < v.count ? grad + int64_t{r} * p.D : nullptr; },
        [&](int pack) { return pack * p.grad_width; });
    stage<true>(
        b_panel(i), inner, p.columns / p.x_width, wanted / p.x_width, p.x_width, x,
        [&](int r) { return row0 + r < v.count ? x + Token(v, row0 + r).corner(videos, v) : nullptr; },
        [&](int pack) { return x_offset[pack * p.x_width]; });
  };
  const bool biased = p.need_bias && k0 == 0;
  const int pair = thread % (kSide / 2) * 2, quarter = thread / (kSide / 2);
  float total[2] = {};  // of two columns of g, over a quarter of the rows of each step
  SumsOfWarp sum = {};
  pipeline(steps, issue, [&](int i) {
    if (d0 + thread / 64 * 32 < p.D) multiply_groups<Along::outer>(sum, a_panel(i), b_panel(i), wanted, inner);
    if (!biased) return;
    float part[2] = {};
#pragma unroll
    for (int r = 0; r < inner / kQuarters; ++r) {
      Pack<T, 2> two;
      two.words[0] =
          *reinterpret_cast<const typename Pack<T, 2>::word*>(a_panel(i).row(quarter * (inner / kQuarters) + r) + pair);
      float v[2];
      widen(two, v);
      part[0] += v[0], part[1] += v[1];
    }
    total[0] += part[0], total[1] += part[1];
  });
  float* const partial = p.partial + (p.first_split + split) * p.pitch;
  if (p.need_weight) {
    each_pair([&](int r, int c, int g, int i, int j, int e) {
      if (d0 + r >= p.D || c >= wanted) return;
      float* at = partial + int64_t{d0 + r} * p.K + k0 + c;
      const float two[2] = {sum[g][i][j][e], sum[g][i][j][e + 1]};
      if (p.pairs) return store_once(at, narrow<float, 2>(two));
      at[0] = two[0];
      if (c + 1 < wanted) at[1] = two[1];
    });
  }
  if (!biased) return;
  column_sums[quarter][pair] = total[0], column_sums[quarter][pair + 1] = total[1];
  __syncthreads();
  if (thread >= kSide || d0 + thread >= p.D) return;
  float all = 0;
  for (int q = 0; q < kQuarters; ++q) all += column_sums[q][thread];
  partial[int64_t{p.D} * p.K + d0 + thread] = all;
}

// ---- sums --------------------------------------------------------------------------------------------------
template <int W>
__global__ void __launch_bounds__(kThreads) patch_sum_kernel(const PatchSum p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * W;
  if (i >= p.size) return;
  float sum[W] = {};
#pragma unroll 4
  for (int64_t s = 0; s < p.count; ++s) {
    float v[W];
    load_as<W>(p.of, p.dtype, s * p.pitch + i, v);
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] += v[k];
  }
  store_as<W>(p.out, p.out_dtype, i, sum);
}

// ---- host --------------------------------------------------------------------------------------------------
int values(const PatchEmbedParams& p) { return static_cast<int>(p.channels * p.patch[0] * p.patch[1] * p.patch[2]); }
int code_size(int dtype) { return static_cast<int>(itemsize(static_cast<DType>(dtype))); }

// What both kernels are told; `step` values of K: what a panel's rows are filled up to.
EmbedGrad common(const PatchEmbedParams& p, int step) {
  EmbedGrad e{};
  e.weight = p.weight, e.grad = p.y;
  for (int d = 0; d < 5; ++d) e.weight_stride[d] = p.weight_stride[d];
  e.D = static_cast<int>(p.dim), e.K = values(p);
  const int whole = (e.K + step - 1) / step * step;
  e.columns = whole < kSide ? whole : kSide, e.k_tiles = (e.K + e.columns - 1) / e.columns;
  e.weight_width = pack_width(p.weight, code_size(p.weight_dtype), {p.channels, p.patch[0], p.patch[1], p.patch[2]},
                              p.weight_stride + 1, {p.weight_stride[0]});
  e.grad_width = 16 / code_size(p.dtype);
  while (e.D % e.grad_width || reinterpret_cast<uintptr_t>(p.y) % (e.grad_width * code_size(p.dtype)))
    e.grad_width /= 2;
  return e;
}

template <class TX, class T>
void run_dx(const PatchEmbedParams& p, Stream stream, const char* op) {
  EmbedGrad e = common(p, 32);
  const Layout<T> layout(kSide, kInner<T>, kInner<T>, e.columns, kSide + 2 * e.columns);
  each_launch(p, kSide, op, [&](const Videos& v, int x_width, int tiles) {
    e.pairs = x_width % 2 == 0;
    launch(patch_dx_kernel<TX, T>, dim3(static_cast<unsigned>(tiles) * e.k_tiles), dim3(kThreads), layout.bytes, stream,
           op, sizes(p), v, e);
  });
}

// How the tokens are shared: f(videos, pack of x, tiles, tiles of a split).
template <class F>
void each_split(const PatchEmbedParams& p, const EmbedGrad& e, int device, const char* op, F&& f) {
  const int outputs = (e.D + kSide - 1) / kSide * e.k_tiles, most = (2 * processors(device) + outputs - 1) / outputs;
  each_launch(p, 128 / code_size(p.dtype), op, [&](const Videos& v, int x_width, int tiles) {
    const int splits = tiles < most ? tiles : most;
    f(v, x_width, tiles, (tiles + splits - 1) / splits);
  });
}

template <class T>
void run_dw(const PatchEmbedParams& p, EmbedGrad e, Stream stream, const char* op) {
  const Layout<T> layout(kInner<T>, kSide, kInner<T>, e.columns, e.columns);
  each_split(p, e, stream.device, op, [&](const Videos& v, int x_width, int tiles, int per) {
    e.x_width = x_width, e.tiles = tiles, e.per = per;
    const int splits = (tiles + per - 1) / per, outputs = (e.D + kSide - 1) / kSide * e.k_tiles;
    launch(patch_dw_kernel<T>, dim3(static_cast<unsigned>(outputs), static_cast<unsigned>(splits)), dim3(kThreads),
           layout.bytes, stream, op, sizes(p), v, e);
    e.first_split += splits;
  });
}

}  // namespace

void patch_embed3d_dx(const PatchEmbedParams& p, Stream stream,
                      const char* op){FASTDIT_DTYPES(p.dtype, p.weight_dtype, run_dx, p, stream, op)}

int64_t patch_embed3d_splits(const PatchEmbedParams& p, int device) {
  int64_t splits = 0;
  each_split(p, common(p, 32), device, "patch_embed3d_backward",
             [&](const Videos&, int, int tiles, int per) { splits += (tiles + per - 1) / per; });
  return splits;
}

int64_t patch_embed3d_pitch(const PatchEmbedParams& p) { return (p.dim * values(p) + p.dim + 3) / 4 * 4; }

void patch_embed3d_dw(const PatchEmbedParams& p, void* d_weight, void* d_bias, float* partial, Stream stream,
                      const char* op) {
  EmbedGrad e = common(p, 32);
  e.need_weight = d_weight != nullptr, e.need_bias = d_bias != nullptr;
  e.partial = partial, e.pitch = patch_embed3d_pitch(p), e.pairs = e.K % 2 == 0;
  const auto first = [&] {
    switch (static_cast<DType>(p.dtype)) {
      case DType::f32:
        return run_dw<float>(p, e, stream, op);
      case DType::bf16:
        return run_dw<bf16>(p, e, stream, op);
      default:
        return run_dw<f16>(p, e, stream, op);
    }
  };
  first();
  const int64_t size = p.dim * e.K, splits = patch_embed3d_splits(p, stream.device);
  const int f32 = static_cast<int>(DType::f32);
  if (d_weight) patch_sum({partial, f32, splits, e.pitch, d_weight, p.weight_dtype, size}, stream, op);
  if (d_bias) patch_sum({partial + size, f32, splits, e.pitch, d_bias, p.bias_dtype, p.dim}, stream, op);
}

void patch_sum(const PatchSum& sum, Stream stream, const char* op) {
  const bool wide = sum.size % 4 == 0 && fits(sum.of, code_size(sum.dtype), 4, {sum.pitch}) &&
                    fits(sum.out, code_size(sum.out_dtype), 4, {});
  const int64_t each = int64_t{kThreads} * (wide ? 4 : 1);
  launch(wide ? patch_sum_kernel<4> : patch_sum_kernel<1>, dim3(static_cast<unsigned>((sum.size + each - 1) / each)),
         dim3(kThreads), 0, stream, op, "size=" + std::to_string(sum.size) + " count=" + std::to_string(sum.count),
         sum);
}

}  // namespace fastdit::cuda
