// Causal 3-D convolution as an implicit GEMM on the warp's matrix unit; its own backward towards the input.
//
//   y[b, n, p] = sum over taps and c of x[b, c, p * stride + tap * dilation - pad] * w[n, tap, c] + bias[n] + residual
//
// A block owns kRows pixels of one output frame, a rectangle of 2^k columns, and `columns` of Cout (96, 128 or 192 of
// the models' widths leave no lane idle). Which frames of cat(cache, x) its taps meet is a matter of a few scalars: a
// frame that does not exist is skipped, one of the cache comes from another pointer.
//
// A step multiplies one tap by 64 bytes of channels of every pixel. The pixels that all taps of a frame meet, the
// patch, stand in shared memory once for those taps (halo), each tap reading its own rows of it: L2 sees 1.4 instead of
// 9 reads of x. Where strides or dilations make that patch larger than what is read, a tap has a patch of its own.
// Padding is the zero fill of cp.async, repeated pixels another address. Nothing is copied, padded or concatenated.
#include "conv_product.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kStages = 4, kSpan = 64;  // kSpan: bytes of channels in a step
constexpr int kSharedBytes = 96 * 1024;  // of tiles; sm_86 and sm_89 have no more for a block

struct Plan {
  int columns;           // log2 of a tile's width in pixels
  int patch_h, patch_w;  // pixels of x in a patch
  int step_h, step_w;    // of x between two of them
  int row_h, row_w;      // patch rows and columns between two output pixels
  int taps_h, taps_w;    // that share a patch
  int buffers;           // patches in shared memory
  int tiles_h, tiles_w, tiles_n;
};

using Rows = Tile<kSpan / 2>;  // kSpan bytes each

// Of a step: frame of the kernel, the tap that its patch begins with, the tap inside the patch, channels, patch number.
struct Step {
  int t, h, w, inner_h, inner_w, c, patch;
};

template <class T, int BN, int WM>
struct Block {
  static constexpr int WN = kThreads / 32 / WM, MI = kRows / WM / 16, NI = BN / WN / 8;
  static constexpr int PER = 16 / sizeof(T), CHANNELS = kSpan / sizeof(T);
  static constexpr int WEIGHTS = BN * kSpan;         // bytes of a stage
  static constexpr int PITCH = BN * sizeof(T) + 16;  // of the tile on its way out
  using Sums = Accumulator<T, MI, NI>;
  static_assert(MI >= 1 && NI % 2 == 0);

  const ConvParams& p;
  const ConvTaps& taps;
  const Plan& plan;
  char* const bytes;
  const int lane, warp_m, warp_n, C;
  int b, t, n0, first_h, first_w, first_t;  // first output pixel and Cout of the tile; first_t: frame of tap 0
  TapRange frames;

  __device__ Block(const ConvParams& params, const ConvTaps& weight, const Plan& how, char* shared)
      : p(params),
        taps(weight),
        plan(how),
        bytes(shared),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp_m(static_cast<int>(threadIdx.x) / 32 / WN),
        warp_n(static_cast<int>(threadIdx.x) / 32 % WN),
        C(static_cast<int>(p.cin)) {
    int rest = static_cast<int>(blockIdx.x);
    n0 = rest % plan.tiles_n * BN, rest /= plan.tiles_n;
    first_w = rest % plan.tiles_w << plan.columns, rest /= plan.tiles_w;
    first_h = rest % plan.tiles_h * (kRows >> plan.columns), rest /= plan.tiles_h;
    const int out_frames = static_cast<int>(p.to);
    t = rest % out_frames, b = rest / out_frames;
    first_t = t * static_cast<int>(p.stride[0]) - static_cast<int>(p.pad_t);
    frames = taps_of(p, first_t);
  }

  __device__ __forceinline__ void advance(Step& s) const {
    if (++s.inner_w < plan.taps_w) return;
    s.inner_w = 0;
    if (++s.inner_h < plan.taps_h) return;
    s.inner_h = 0, ++s.patch;
    if ((s.c += CHANNELS) < C) return;
    s.c = 0;
    if ((s.w += plan.taps_w) < p.kernel[2]) return;
    s.w = 0;
    if ((s.h += plan.taps_h) < p.kernel[1]) return;
    s.h = 0, ++s.t;
  }

  __device__ __forceinline__ Rows weights(int step) const { return {bytes + step % kStages * WEIGHTS}; }
  __device__ __forceinline__ Rows patch(int number) const {
    return {bytes + kStages * WEIGHTS + number % plan.buffers * (plan.patch_h * plan.patch_w * kSpan)};
  }
  // Bytes of channels c + part * PER and on that exist, of sixteen.
  __device__ __forceinline__ int filled(int c, int part) const {
    return min(max((C - c - part * PER) * static_cast<int>(sizeof(T)), 0), 16);
  }

  __device__ __forceinline__ void fetch(const Step& s, int step) const {
    const T* w =
        static_cast<const T*>(taps.data) + s.t * taps.t + (s.h + s.inner_h) * taps.h + (s.w + s.inner_w) * taps.w + s.c;
    const Rows taps_to = weights(step);
    each<kThreads>(BN * 4, [&](int i) {
      const int n = i / 4, part = i % 4, full = n0 + n < p.cout ? filled(s.c, part) : 0;
      copy_async<16>(taps_to.at(n, part), full ? w + (n0 + n) * taps.n + part * PER : w, full);
    });
    if (s.inner_h || s.inner_w) return;
    const Frame<T> x = frame_of<T>(p, b, first_t + s.t * static_cast<int>(p.dilation[0]));
    const int h0 =
        first_h * static_cast<int>(p.stride[1]) - static_cast<int>(p.pad_h) + s.h * static_cast<int>(p.dilation[1]);
    const int w0 =
        first_w * static_cast<int>(p.stride[2]) - static_cast<int>(p.pad_w) + s.w * static_cast<int>(p.dilation[2]);
    const Rows to = patch(s.patch);
    each<kThreads>(plan.patch_h * plan.patch_w * 4, [&](int i) {
      const int row = i / 4, part = i % 4, line = row / plan.patch_w;
      const int h = fold(h0 + line * plan.step_h, static_cast<int>(p.h), p.space_pad);
      const int w = fold(w0 + (row - line * plan.patch_w) * plan.step_w, static_cast<int>(p.w), p.space_pad);
      const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
      const int full = inside ? filled(s.c, part) : 0;
      copy_async<16>(to.at(row, part), full ? x.data + h * x.stride_h + w * x.stride_w + s.c + part * PER : x.data,
                     full);
    });
  }

  // Of the tile's pixel m.
  __device__ __forceinline__ bool pixel(int m, int& h, int& w) const {
    h = first_h + (m >> plan.columns), w = first_w + (m & ((1 << plan.columns) - 1));
    return h < p.ho && w < p.wo;
  }

  // The products of a step. corner: patch row of this lane's pixels at the patch's first tap; shift: rows from there to
  // the tap; c: first of the channels.
  __device__ __forceinline__ void product(Sums& total, const int (&corner)[MI], Rows x, Rows w, int shift,
                                          int c) const {
#pragma unroll
    for (int k = 0; k < kSpan / 32; k += Sums::LOADS) {
      if (k && C - c <= k * (CHANNELS / 2)) break;  // the same for every thread
      uint32_t a[Sums::LOADS][MI][4], bb[Sums::LOADS][NI][2];
#pragma unroll
      for (int l = 0; l < Sums::LOADS; ++l) {
#pragma unroll
        for (int i = 0; i < MI; ++i) load_matrices<false>(a[l][i], x.at(corner[i] + shift, 2 * (k + l) + lane / 16));
#pragma unroll
        for (int j = 0; j < NI; j += 2) {
          uint32_t two[4];
          const int row = (warp_n * NI + j) * 8 + lane % 8 + lane / 16 * 8;
          load_matrices<false>(two, w.at(row, 2 * (k + l) + lane / 8 % 2));
          bb[l][j][0] = two[0], bb[l][j][1] = two[1], bb[l][j + 1][0] = two[2], bb[l][j + 1][1] = two[3];
        }
      }
      total.add(a, bb);
    }
  }

  __device__ __forceinline__ void sums(Sums& total) const {
    const int shared_taps = plan.taps_h * plan.taps_w;
    const int patches = static_cast<int>((frames.end - frames.begin) * (p.kernel[1] * p.kernel[2] / shared_taps)) *
                        ((C + CHANNELS - 1) / CHANNELS);
    const int steps = patches * shared_taps;
    const int shift_w = static_cast<int>(p.dilation[2]);  // patch rows from a tap to the next, and to the next line's
    const int shift_h = static_cast<int>(p.dilation[1]) * plan.patch_w - plan.taps_w * shift_w;
    int corner[MI], h, w;
    const bool live = pixel(warp_m * MI * 16, h, w) && n0 + warp_n * NI * 8 < p.cout;  // of this warp
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      const int m = (warp_m * MI + i) * 16 + lane % 16;
      corner[i] = (m >> plan.columns) * plan.row_h * plan.patch_w + (m & ((1 << plan.columns) - 1)) * plan.row_w;
    }
    Step next{frames.begin, 0, 0, 0, 0, 0, 0};
    int tap = 0, tap_w = 0, shift = 0, c = 0, number = 0;  // of the step whose products are formed
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) fetch(next, s), advance(next);
      copy_commit();
    }
    for (int s = 0; s < steps; ++s) {
      copy_wait<kStages - 2>();
      __syncthreads();
      if (s + kStages - 1 < steps) fetch(next, s + kStages - 1), advance(next);
      copy_commit();
      if (live) product(total, corner, patch(number), weights(s), shift, c);
      shift += shift_w;
      if (++tap_w == plan.taps_w) tap_w = 0, shift += shift_h;
      if (++tap == shared_taps) {
        tap = shift = 0, ++number;
        if ((c += CHANNELS) >= C) c = 0;
      }
    }
  }

  // ---- the way out ------------------------------------------------------------------------------------------
  // Calls body(m, n, element) for every value of the tile that exists; body of 16 bytes where `packs`.
  template <class F>
  __device__ __forceinline__ void walk(const int64_t (&stride)[kAxes], bool packs, F&& body) const {
    const int per = packs ? PER : 1;
    const bool pixels_first = stride[1] != 1;  // neighbouring threads take neighbouring pixels
    const int64_t start = b * stride[0] + t * stride[2];
    each<kThreads>(kRows * BN / per, [&](int i) {
      const int m = pixels_first ? i % kRows : i / (BN / per), n = (pixels_first ? i / kRows : i % (BN / per)) * per;
      int h, w;
      if (pixel(m, h, w) && n0 + n < p.cout) body(m, n, start + (n0 + n) * stride[1] + h * stride[3] + w * stride[4]);
    });
  }
  __device__ __forceinline__ T* staged(int m, int n) const { return reinterpret_cast<T*>(bytes + m * PITCH) + n; }

  template <class F>
  __device__ __forceinline__ void fragments(const Sums& sum, F&& body) const {
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          body((warp_m * MI + i) * 16 + half * 8 + lane / 4, (warp_n * NI + j) * 8 + lane % 4 * 2,
               sum.value(i, j, 2 * half), sum.value(i, j, 2 * half + 1));
  }

  __device__ __forceinline__ void store(const Sums& sum, bool residual_packs, bool y_packs) const {
    if (p.wide) {
      float* y = static_cast<float*>(p.y);
      fragments(sum, [&](int m, int n, float first, float second) {
        int h, w;
        if (!pixel(m, h, w)) return;
        const int64_t at =
            b * p.y_stride[0] + (n0 + n) * p.y_stride[1] + t * p.y_stride[2] + h * p.y_stride[3] + w * p.y_stride[4];
        if (n0 + n < p.cout) y[at] = first;
        if (n0 + n + 1 < p.cout) y[at + p.y_stride[1]] = second;
      });
      return;
    }
    __syncthreads();  // the last step has read its tiles
    if (p.residual) {
      const T* r = static_cast<const T*>(p.residual);
      walk(p.residual_stride, residual_packs, [&](int m, int n, int64_t at) {
        if (residual_packs)
          *reinterpret_cast<uint4*>(staged(m, n)) = __ldcs(reinterpret_cast<const uint4*>(r + at));
        else
          *staged(m, n) = r[at];
      });
      __syncthreads();
    }
    fragments(sum, [&](int m, int n, float first, float second) {
      int h, w;
      if (!pixel(m, h, w)) return;
      T* to = staged(m, n);
      float pair[2] = {first, second};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (n0 + n + k >= p.cout) break;
        if (p.bias) {
          float bias[1];
          load_as<1>(p.bias, p.bias_dtype, n0 + n + k, bias);
          pair[k] += bias[0];
        }
        if (p.residual) pair[k] += to_float(to[k]);
      }
      const Pack<T, 2> both = narrow<T, 2>(pair);
      *reinterpret_cast<typename Pack<T, 2>::word*>(to) = both.words[0];
    });
    __syncthreads();
    T* y = static_cast<T*>(p.y);
    walk(p.y_stride, y_packs, [&](int m, int n, int64_t at) {
      if (y_packs)
        __stcs(reinterpret_cast<uint4*>(y + at), *reinterpret_cast<const uint4*>(staged(m, n)));
      else
        y[at] = *staged(m, n);
    });
  }
};

// Two blocks share a multiprocessor where their registers allow it.
template <class T, int BN, int WM>
__global__ void __launch_bounds__(kThreads, BN > 128 || std::is_same_v<T, float> ? 1 : 2)
    conv_forward_kernel(const ConvParams p, const ConvTaps taps, const Plan plan, int residual_packs, int y_packs) {
  FASTDIT_SHARED_DYNAMIC(bytes, 128);
  using Whole = Block<T, BN, WM>;
  Whole tile(p, taps, plan, bytes);
  typename Whole::Sums sum;
  tile.sums(sum);
  tile.store(sum, residual_packs, y_packs);
}

// ---- the host -----------------------------------------------------------------------------------------------
// Without taps in space, and where frames are one run of pixels, a frame is one row of them: no edges to pad.
void flatten(ConvParams& p) {
  const auto run = [&](const void* data, const int64_t (&stride)[kAxes]) {
    return !data || p.h == 1 || stride[3] == p.w * stride[4];
  };
  if (p.kernel[1] != 1 || p.kernel[2] != 1 || p.stride[1] != 1 || p.stride[2] != 1 || p.pad_h || p.pad_w ||
      p.h != p.ho || p.w != p.wo || !run(p.x, p.x_stride) || !run(p.cache_t ? p.cache : nullptr, p.cache_stride) ||
      !run(p.y, p.y_stride) || !run(p.residual, p.residual_stride))
    return;
  p.w = p.wo = p.h * p.w, p.h = p.ho = 1;
}

// Of all shapes of a tile the one whose patches load the fewest rows.
Plan plan_of(const ConvParams& p, int columns) {
  Plan best{};
  int64_t least = 0;
  const int taps = static_cast<int>(p.kernel[1] * p.kernel[2]), room = kSharedBytes - kStages * columns * kSpan;
  for (int log = 3; log <= 7; ++log) {
    const int width = 1 << log, height = kRows >> log;
    const int halo_h = static_cast<int>((height - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1);
    const int halo_w = static_cast<int>((width - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1);
    const int64_t halo = int64_t{halo_h} * halo_w;
    Plan plan{};
    plan.columns = log;
    if (halo <= taps * kRows && 2 * halo * kSpan <= room) {
      plan.patch_h = halo_h, plan.patch_w = halo_w, plan.step_h = plan.step_w = 1;
      plan.row_h = static_cast<int>(p.stride[1]), plan.row_w = static_cast<int>(p.stride[2]);
      plan.taps_h = static_cast<int>(p.kernel[1]), plan.taps_w = static_cast<int>(p.kernel[2]);
    } else {
      plan.patch_h = height, plan.patch_w = width, plan.row_h = plan.row_w = plan.taps_h = plan.taps_w = 1;
      plan.step_h = static_cast<int>(p.stride[1]), plan.step_w = static_cast<int>(p.stride[2]);
    }
    const int shared_taps = plan.taps_h * plan.taps_w;
    plan.buffers = 1 + (kStages - 1 + shared_taps - 1) / shared_taps;
    if (plan.buffers * int64_t{plan.patch_h} * plan.patch_w * kSpan > room) continue;
    plan.tiles_h = static_cast<int>((p.ho + height - 1) / height);
    plan.tiles_w = static_cast<int>((p.wo + width - 1) / width);
    const int64_t rows = int64_t{plan.tiles_h} * plan.tiles_w *
                         (taps * (kRows + columns) + taps / shared_taps * plan.patch_h * plan.patch_w);
    if (!least || rows < least) best = plan, least = rows;
  }
  best.tiles_n = static_cast<int>((p.cout + columns - 1) / columns);
  return best;
}

template <class T, int BN, int WM>
void start(const ConvParams& p, const ConvTaps& taps, Stream stream, const char* op) {
  using Whole = Block<T, BN, WM>;
  const Plan plan = plan_of(p, BN);
  const int size = static_cast<int>(sizeof(T));
  const bool whole = p.cout % Whole::PER == 0, y_packs = whole && !p.wide && packed(p.y, p.y_stride, size);
  const bool residual_packs = whole && p.residual && packed(p.residual, p.residual_stride, size);
  const size_t tiles = kStages * Whole::WEIGHTS + size_t(plan.buffers) * plan.patch_h * plan.patch_w * kSpan;
  const size_t out = size_t(kRows) * Whole::PITCH;
  const std::string of = sizes(p);
  launch(conv_forward_kernel<T, BN, WM>, dim3(grid(p.n * p.to * plan.tiles_h * plan.tiles_w * plan.tiles_n, op, of)),
         dim3(kThreads), tiles > out ? tiles : out, stream, op, of, p, taps, plan, residual_packs, y_packs);
}

// The width of Cout that covers it best: a tile costs its columns, and as much as 32 for reading x.
template <class T>
void run(const ConvParams& p, const ConvTaps& taps, Stream stream, const char* op) {
  if (p.cout <= 32) return start<T, 32, 4>(p, taps, stream, op);
  if constexpr (std::is_same_v<T, float>) {
    return start<T, 96, 4>(p, taps, stream, op);
  } else {
    int best = 0;
    int64_t least = 0;
    for (int columns : {192, 128, 96}) {
      const int64_t cost = (p.cout + columns - 1) / columns * (columns + 32);
      if (!best || cost < least) best = columns, least = cost;
    }
    if (best == 192) return start<T, 192, 2>(p, taps, stream, op);
    if (best == 128) return start<T, 128, 4>(p, taps, stream, op);
    return start<T, 96, 4>(p, taps, stream, op);
  }
}

}  // namespace

ConvParams conv_checked(const ConvParams& given, const ConvTaps& taps, const char* op) {
  const int size = static_cast<int>(itemsize(static_cast<DType>(given.dtype)));
  check_packed(given, fits(taps.data, size, 16 / size, {taps.n, taps.t, taps.h, taps.w}), op);
  ConvParams p = given;
  flatten(p);
  return p;
}

void conv_forward(const ConvParams& given, const ConvTaps& taps, Stream stream, const char* op) {
  const ConvParams p = conv_checked(given, taps, op);
  FASTDIT_DTYPE(p.dtype, run, p, taps, stream, op)
}

}  // namespace fastdit::cuda
