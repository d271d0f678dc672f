// unpatchify3d and its gradient, bit for bit:
//
//   y[b, c, t * pt + dt, h * ph + dh, w * pw + dw] = tokens[b, (t, h, w)][(dt, dh, dw, c) in any order]
//
// A block takes some neighbouring tokens of a row (b, t, h). Tokens pass through shared memory, so that both ends are
// read and written along what lies side by side: the values of a token, and the pixels of a line (c, dt, dh), in packs
// of 16 bytes where they are aligned. 2 * N * K * itemsize bytes, no FLOPs.
#include "patch.cuh"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 256, kValues = 8192;  // of a block, about

struct Move {
  int K, lines;                 // values of a token; lines that a row of tokens covers: C * pt * ph
  int offset[4];                // inside a token along c, t, h, w
  int tokens;                   // of a block
  int token_width, line_width;  // values of a pack
};

// Line l of a row of tokens: where it stands in the video, and in a token.
struct Line {
  int64_t at;
  int k;
  __device__ __forceinline__ Line(const Videos& s, const Video& v, const Move& p, int l) {
    const int dh = l % s.ph, frame = l / s.ph, dt = frame % s.pt, c = frame / s.pt;
    at = c * v.stride[1] + dt * v.stride[2] + dh * v.stride[3];
    k = c * p.offset[0] + dt * p.offset[1] + dh * p.offset[2];
  }
};

// Lines between the panel and the video, W pixels at a time; `pixels` is a multiple of W, and neighbours in the video
// where W is not 1.
template <int W, bool back, class T>
__device__ __forceinline__ void move_lines(const Videos& s, const Video& v, const Move& p, T* video,
                                           const Panel<T>& panel, int pixels) {
  const int packs = pixels / W;
  for (int i = static_cast<int>(threadIdx.x); i < packs * p.lines; i += kThreads) {
    const int l = i / packs, first = (i - l * packs) * W;
    const Line line(s, v, p, l);
    T* at = video + line.at + (W == 1 ? first * v.stride[4] : first);
    int token = first / s.pw, dw = first - token * s.pw;
    Pack<T, W> pack;
    if constexpr (back) pack = load_once<W>(at);
#pragma unroll
    for (int e = 0; e < W; ++e) {
      T& value = panel.row(token)[line.k + dw * p.offset[3]];
      if constexpr (back)
        value = pack.values[e];
      else
        pack.values[e] = value;
      if (++dw == s.pw) dw = 0, ++token;
    }
    if constexpr (!back) store_once(at, pack);
  }
}

template <int W, bool back, class T>
__device__ __forceinline__ void move_tokens(const Video& v, const Move& p, T* tokens, const Panel<T>& panel,
                                            int count) {
  const int packs = p.K / W;
  for (int i = static_cast<int>(threadIdx.x); i < packs * count; i += kThreads) {
    const int r = i / packs, k = (i - r * packs) * W;
    T* at = tokens + r * v.row_stride[1] + k;
    using Chunk = Pack<T, W>;
    auto* kept = reinterpret_cast<typename Chunk::word*>(panel.row(r) + k);
    Chunk pack;
    if constexpr (back) {
      pack.words[0] = *kept;
      store_once(at, pack);
    } else {
      pack = load_once<W>(at);
      *kept = pack.words[0];
    }
  }
}

template <class T, bool back>
__global__ void __launch_bounds__(kThreads)
    patch_move_kernel(const __grid_constant__ Videos videos, const __grid_constant__ Move p) {
  FASTDIT_SHARED_DYNAMIC(bytes, 16);
  constexpr int W = 16 / sizeof(T);
  const Panel<T> panel{reinterpret_cast<T*>(bytes), Panel<T>::pitch_of(p.K)};
  const int block = static_cast<int>(blockIdx.x);
  const Video& v = video_of(videos, block);
  const int parts = (v.w + p.tokens - 1) / p.tokens, row = (block - v.first_tile) / parts;
  const int first = (block - v.first_tile - row * parts) * p.tokens, count = min(p.tokens, v.w - first);
  const Token corner(v, row * v.w + first);
  T* tokens = static_cast<T*>(const_cast<void*>(v.rows)) + corner.row(v);
  T* video = static_cast<T*>(const_cast<void*>(v.x)) + corner.corner(videos, v);
  const auto between_tokens = [&] {
    p.token_width == W ? move_tokens<W, back>(v, p, tokens, panel, count)
                       : move_tokens<1, back>(v, p, tokens, panel, count);
  };
  const auto between_lines = [&] {
    const int pixels = count * videos.pw;
    if (p.line_width == W) return move_lines<W, back>(videos, v, p, video, panel, pixels);
    if (p.line_width == W / 2) return move_lines<W / 2, back>(videos, v, p, video, panel, pixels);
    move_lines<1, back>(videos, v, p, video, panel, pixels);
  };
  if constexpr (!back) between_tokens();
  if constexpr (back) between_lines();
  __syncthreads();
  if constexpr (!back) between_lines();
  if constexpr (back) between_tokens();
}

template <class T, bool back>
void run(const PatchMove& p, Stream stream, const char* op) {
  constexpr int W = 16 / sizeof(T), size = static_cast<int>(sizeof(T));
  const int64_t pw = p.patch[2], lines = p.channels * p.patch[0] * p.patch[1];
  Move m{static_cast<int>(lines * pw), static_cast<int>(lines), {}, 0, W, 0};
  for (int d = 0; d < 4; ++d) m.offset[d] = static_cast<int>(p.offset[d]);
  const int most = kValues / m.K;
  m.tokens = most >= 64 ? 64 : most >= W ? most / W * W : most > 0 ? most : 1;
  for (int64_t i = 0; i < p.num_items; ++i)
    if (m.K % W || !fits(p.items[i].pos, size, W, {p.items[i].pos_stride[0], p.items[i].pos_stride[1]}))
      m.token_width = 1;
  // what a line of this video, and the part of it that a block has, is made of
  const auto width_of = [&](const PatchItem& item) {
    const auto along = [](int64_t n, int64_t stride) { return n > 1 ? stride : 0; };
    const int64_t odd = item.grid[2] * pw | m.tokens * pw | along(item.batch, item.stride[0]) |
                        along(p.channels, item.stride[1]) | along(item.grid[0] * p.patch[0], item.stride[2]) |
                        along(item.grid[1] * p.patch[1], item.stride[3]);
    for (const int width : {W, W / 2})
      if (item.stride[4] == 1 && odd % width == 0 && reinterpret_cast<uintptr_t>(item.x) % (width * size) == 0)
        return width;
    return 1;
  };
  const auto tiles_of = [&](const PatchItem& i) {
    return i.batch * i.grid[0] * i.grid[1] * ((i.grid[2] + m.tokens - 1) / m.tokens);
  };
  each_launch(p.items, p.num_items, p.patch, op, width_of, tiles_of, [&](const Videos& v, int line_width, int tiles) {
    m.line_width = line_width;
    launch(patch_move_kernel<T, back>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
           sizeof(T) * Panel<T>::pitch_of(m.K) * m.tokens, stream, op,
           "K=" + std::to_string(m.K) + " itemsize=" + std::to_string(size), v, m);
  });
}

}  // namespace

void patch_move(const PatchMove& p, Stream stream, const char* op) {
  if (p.itemsize == 2) return p.back ? run<bf16, true>(p, stream, op) : run<bf16, false>(p, stream, op);
  p.back ? run<float, true>(p, stream, op) : run<float, false>(p, stream, op);
}

}  // namespace fastdit::cuda
