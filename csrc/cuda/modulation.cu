// Modulation forward:
//   r = residual + act(gate) * [rms](y)
//   h = n(r) * (1 + scale) + shift          n of r as stored
//
// A group of warps holds a row in registers from its reading to h, so memory sees each token tensor once; the next row
// is on its way meanwhile. A group takes consecutive tokens, so table rows come from L1 until they change.
#include "modulation.cuh"
#include "modulation.h"

namespace fastdit::cuda {
namespace {

template <class T, class TR, int W, int V, bool native>
struct Forward {
  const ModulationParams& p;
  const Place place;
  Sums sums;
  const int C, N;
  const float inverse;  // 1 / C
  Pack<T, W> next_y[V];
  Pack<TR, W> next_residual[V];

  __device__ Forward(const ModulationParams& params, int warps, float inverse_channels, float (*partial)[2][kMaxWarps])
      : p(params),
        place(warps),
        sums{partial, warps},
        C(static_cast<int>(params.C)),
        N(static_cast<int>(params.N)),
        inverse(inverse_channels) {}

  static __device__ __forceinline__ float round(float x) { return rounded<T, native>(x); }

  template <class F>
  __device__ __forceinline__ void packs(F&& body) const {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (const int c = place.template channel<W>(j); c < C) body(j, c);
  }

  __device__ __forceinline__ void fetch(int i) {
    const T* y = token<const T>(p.y, p.y_stride_b, p.y_stride_n, N, i);
    packs([&](int j, int c) { next_y[j] = load_once<W>(y + c); });
    if (!p.residual) return;
    const TR* residual = token<const TR>(p.residual, p.residual_stride_b, p.residual_stride_n, N, i);
    packs([&](int j, int c) { next_residual[j] = load_once<W>(residual + c); });
  }

  // act(gate) * [rms](y)
  __device__ __forceinline__ void branch(float (&x)[V][W], const TableRow& gate) {
    if (p.post_norm) {
      float zero, root;
      moments<W, V>(x, false, C, inverse, static_cast<float>(p.post_eps), place, sums, zero, root);
      packs([&](int j, int c) {
        float w[W];
        if (p.post_weight.data) load_as<W>(p.post_weight.data, p.post_weight.dtype, c, w);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          x[j][k] = round(x[j][k] * root);
          if (p.post_weight.data) x[j][k] = round(x[j][k] * w[k]);
        }
      });
    }
    if (!p.gate.data) return;
    packs([&](int j, int c) {
      float g[W];
      load_as<W>(p.gate.data, p.gate.dtype, gate.at + c, g);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float open = p.gate_act == GateAct::none ? g[k] : round(act(p.gate_act, g[k]));
        x[j][k] = round(x[j][k] * open);
      }
    });
  }

  __device__ __forceinline__ void norm_modulate(float (&x)[V][W], const TableRow& shift, const TableRow& scale, T* h) {
    const bool rms = p.norm == Norm::rms, weighted = p.weight.data != nullptr;
    const float offset = static_cast<float>(p.weight_offset);
    float mean, root;
    moments<W, V>(x, !rms, C, inverse, static_cast<float>(p.eps), place, sums, mean, root);
    packs([&](int j, int c) {
      float v[W];
#pragma unroll
      for (int k = 0; k < W; ++k) x[j][k] = (x[j][k] - mean) * root;
      // eager RMSNorm rounds before its affine part, F.layer_norm only after it
      if (rms)
#pragma unroll
        for (int k = 0; k < W; ++k) x[j][k] = round(x[j][k]);
      if (weighted) {
        load_as<W>(p.weight.data, p.weight.dtype, c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          x[j][k] *= offset == 0 ? v[k] : round(v[k] + offset);
          if (rms) x[j][k] = round(x[j][k]);
        }
      }
      if (p.bias.data) {
        load_as<W>(p.bias.data, p.bias.dtype, c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) x[j][k] += v[k];
      }
#pragma unroll
      for (int k = 0; k < W; ++k) x[j][k] = round(x[j][k]);
      if (p.scale.data) {
        load_as<W>(p.scale.data, p.scale.dtype, scale.at + c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) x[j][k] = round(x[j][k] * round(1.0f + v[k]));
      }
      if (p.shift.data) {
        load_as<W>(p.shift.data, p.shift.dtype, shift.at + c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) x[j][k] += v[k];
      }
      store_once(h + c, narrow<T, W>(x[j]));
    });
  }

  __device__ __forceinline__ void run(int begin, int end) {
    TableRow gate{0, begin}, shift{0, begin}, scale{0, begin};
    if (begin < end) fetch(begin);
    for (int i = begin; i < end; ++i) {
      if (p.gate.data && i >= gate.end) gate = table_row(p.gate, p.gate_row_index, p.index_is_64, N, i);
      if (p.shift.data && i >= shift.end) shift = table_row(p.shift, p.row_index, p.index_is_64, N, i);
      if (p.scale.data && i >= scale.end) scale = table_row(p.scale, p.row_index, p.index_is_64, N, i);
      float x[V][W] = {};
      Pack<TR, W> residual[V];
      packs([&](int j, int) {
        widen(next_y[j], x[j]);
        if (p.residual) residual[j] = next_residual[j];
      });
      if (i + 1 < end) fetch(i + 1);
      if (p.residual) {
        branch(x, gate);
        TR* r = static_cast<TR*>(p.r) + static_cast<int64_t>(i) * C;
        packs([&](int j, int c) {
          float v[W];
          widen(residual[j], v);
#pragma unroll
          for (int k = 0; k < W; ++k) v[k] += x[j][k];
          const Pack<TR, W> stored = narrow<TR, W>(v);
          store_once(r + c, stored);
          widen(stored, x[j]);
        });
      }
      if (p.norm != Norm::none) norm_modulate(x, shift, scale, static_cast<T*>(p.h) + static_cast<int64_t>(i) * C);
    }
  }
};

// Group g takes tokens g * per and the `per` - 1 after it.
template <class T, class TR, int W, int V, bool native>
__global__ void __launch_bounds__(32 * kMaxWarps)
    modulation_forward_kernel(const ModulationParams p, int warps, int per, float inverse) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], partial);
  Forward<T, TR, W, V, native> forward(p, warps, inverse, partial);
  const int rows = static_cast<int>(p.B * p.N), begin = forward.place.group * per;
  forward.run(min(begin, rows), min(begin + per, rows));
}

template <class T, class TR, int W, int V>
void start(const ModulationParams& p, const Geometry& g, Stream stream, const char* op) {
  const int64_t rows = p.B * p.N;
  // enough blocks for every processor to have 2048 threads, and no more: then each walks on
  const int64_t most = int64_t{processors(stream.device)} * (2048 / g.threads() > 16 ? 16 : 2048 / g.threads());
  const int64_t blocks = (rows + g.groups() - 1) / g.groups() < most ? (rows + g.groups() - 1) / g.groups() : most;
  const int per = static_cast<int>((rows + blocks * g.groups() - 1) / (blocks * g.groups()));
  const dim3 grid(static_cast<unsigned>((rows + int64_t{per} * g.groups() - 1) / (int64_t{per} * g.groups())));
  constexpr bool half = sizeof(T) == 2;
  const auto kernel =
      half && p.native ? modulation_forward_kernel<T, TR, W, V, half> : modulation_forward_kernel<T, TR, W, V, false>;
  launch(kernel, grid, dim3(g.threads()), 0, stream, op, sizes(p), p, g.warps, per, 1.0f / p.C);
}

template <class T, class TR>
void run(const ModulationParams& p, Stream stream, const char* op) {
  constexpr int wide = 16 / sizeof(T);
  const int W = pack_width(p);
  const Geometry g = W == 1 ? geometry(p.C, 1, {8}) : geometry(p.C, W, {8 / W, 16 / W});
  if (!g.warps) throw std::invalid_argument(std::string(op) + ": too many channels; got " + sizes(p));
  if (g.W == 1) return start<T, TR, 1, 8>(p, g, stream, op);
  if (g.V * g.W == 8) return start<T, TR, wide, 8 / wide>(p, g, stream, op);
  return start<T, TR, wide, 16 / wide>(p, g, stream, op);
}

}  // namespace

void modulation_forward(const ModulationParams& p, Stream stream, const char* op) {
  check_tokens(p, op);
  FASTDIT_DTYPES(p.dtype, p.residual_dtype, run, p, stream, op)
}

}  // namespace fastdit::cuda
