// Modulation backward: one pass over the tokens, then fixed-order sums for everything that tokens share.
//
//   n = (r - mean) * root,  a = n * w + b,  h = a * (1 + scale) + shift,  r = residual + act(gate) * yn,  yn = [rms](y)
//   g = dh * (1 + scale) * w,     dr = grad_r + root * (g - mean(g) - n * mean(g * n))        (rms: without mean(g))
//   dshift += dh,  dscale += dh * a,  dweight += dh * (1 + scale) * n,  dbias += dh * (1 + scale)
//   dresidual = dr,  dgate += dr * yn * act'(gate),  dyn = dr * act(gate),  dy likewise through the rms
//
// A program (a group of warps) takes consecutive positions: tokens, or what an order lists. Each table is a sequence of
// runs, positions that use one row; a program sums a run in registers. A run that it holds whole goes to the gradient;
// of one that it shares, it writes a partial row: slot 1 where the run begins in it, slot 0 where it came in from
// before. modulation_sums_kernel adds those. No atomics: the bits do not depend on who ran when.
#include "modulation.cuh"
#include "modulation.h"
#include "strips.h"

namespace fastdit::cuda {
namespace {

struct Walk {
  const int32_t *tokens, *offsets;
  int per, programs, rows;
  float inverse;  // 1 / C
  float* partial;
};

// The run at a position: its table row, and its first and last position but one.
struct Run {
  int row, head, tail;
};
__device__ __forceinline__ Run run_of_table(const Walk& walk, const Table& t, const TableGrad& grad, const void* index,
                                            int is_64, int N, int position) {
  if (walk.offsets) {
    const int row = static_cast<int>(index_at(index, is_64, walk.tokens ? walk.tokens[position] : position));
    return {row, walk.offsets[row], walk.offsets[row + 1]};
  }
  const int per = static_cast<int>(t.tokens_per_row), b = position / N, m = (position - b * N) / per;
  const int head = b * N + m * per;
  return {b * static_cast<int>(grad.rows_b) + m, head, min(head + per, (b + 1) * N)};
}

// What one program has of a table's gradient.
template <int W, int V>
struct Sink {
  float sum[V][W];
  int row, tail;  // of the run at hand; ~row where it came in from before. Three registers less than a Run per table.

  __device__ __forceinline__ void open(const Run& next, int begin) {
    row = next.head >= begin ? next.row : ~next.row, tail = next.tail;
#pragma unroll
    for (int j = 0; j < V; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) sum[j][k] = 0;
  }
  __device__ __forceinline__ void close(const TableGrad& grad, const Walk& walk, int block, int end, const Place& place,
                                        int C) const {
    const bool whole = row >= 0 && tail <= end;
    const int64_t slot = (static_cast<int64_t>(block) * walk.programs + place.group) * 2 + (row >= 0);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int c = place.channel<W>(j);
      if (c >= C) continue;
      if (whole)
        store_as<W>(grad.data, grad.dtype, static_cast<int64_t>(row) * C + c, sum[j]);
      else
        store_once(walk.partial + slot * C + c, narrow<float, W>(sum[j]));
    }
  }
};

enum : int { kGate, kShift, kScale, kWeight, kBias, kPost, kTables };

// The number of a wanted gradient's partial rows among those of all wanted ones.
__host__ __device__ inline const TableGrad& gradient(const ModulationGradParams& q, int i) {
  return i == kGate     ? q.gate
         : i == kShift  ? q.shift
         : i == kScale  ? q.scale
         : i == kWeight ? q.weight
         : i == kBias   ? q.bias
                        : q.post_weight;
}
__host__ __device__ inline int block_of(const ModulationGradParams& q, int table) {
  int block = 0;
  for (int i = 0; i < table; ++i) block += gradient(q, i).data != nullptr;
  return block;
}

// kinds: which gradients one pass can sum, kTableSums | kVectorSums.
constexpr int kTableSums = 1, kVectorSums = 2;

template <class T, class TR, int W, int V, int kinds>
struct Backward {
  static constexpr bool tables = (kinds & kTableSums) != 0, vectors = (kinds & kVectorSums) != 0;

  const ModulationGradParams& q;
  const ModulationParams& p;
  const Walk& walk;
  const Place place;
  Sums sums;
  const int C, N;
  int begin, end;
  Sink<W, V> gate, shift, scale, weight, bias, post;  // no registers for those that the kind leaves out

  __device__ Backward(const ModulationGradParams& params, const Walk& w, int warps, float (*partial)[2][kMaxWarps])
      : q(params),
        p(params.forward),
        walk(w),
        place(warps),
        sums{partial, warps},
        C(static_cast<int>(p.C)),
        N(static_cast<int>(p.N)),
        begin(min(place.group * w.per, w.rows)),
        end(min(begin + w.per, w.rows)) {}

  template <class F>
  __device__ __forceinline__ void packs(F&& body) const {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (const int c = place.template channel<W>(j); c < C) body(j, c);
  }

  __device__ __forceinline__ void step(Sink<W, V>& sink, int table, const Table& t, const void* index, int position) {
    const TableGrad& grad = gradient(q, table);
    if (!grad.data || (position > begin && position < sink.tail)) return;
    if (position > begin) sink.close(grad, walk, block_of(q, table), end, place, C);
    if (position < end) sink.open(run_of_table(walk, t, grad, index, p.index_is_64, N, position), begin);
  }
  __device__ __forceinline__ void finish(const Sink<W, V>& sink, int table) {
    const TableGrad& grad = gradient(q, table);
    if (grad.data) sink.close(grad, walk, block_of(q, table), end, place, C);
  }

  // root * (g - mean(g) - n * mean(g * n)), in place of g
  __device__ __forceinline__ void through_norm(float (&g)[V][W], const float (&n)[V][W], float root, bool rms) {
    float both[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < V; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) both[0] += g[j][k], both[1] += g[j][k] * n[j][k];
    sums(both);
    const float level = rms ? 0 : both[0] * walk.inverse, slope = both[1] * walk.inverse;
#pragma unroll
    for (int j = 0; j < V; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) g[j][k] = (g[j][k] - level - n[j][k] * slope) * root;
  }

  // yn * [post weight], the branch before its gate; unit: yn
  __device__ __forceinline__ void weighted(float (&x)[W], int c) const {
    if (!p.post_weight.data) return;
    float w[W];
    load_as<W>(p.post_weight.data, p.post_weight.dtype, c, w);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] *= w[k];
  }
  __device__ __forceinline__ void opened(float (&g)[W], const TableRow& row, int c) const {
    load_as<W>(p.gate.data, p.gate.dtype, row.at + c, g);
#pragma unroll
    for (int k = 0; k < W; ++k) g[k] = act(p.gate_act, g[k]);
  }

  __device__ __forceinline__ void norm_gradient(float (&r)[V][W], float (&g)[V][W], const TableRow& scales, int i) {
    const bool rms = p.norm == Norm::rms;
    float mean, root;
    moments<W, V>(r, !rms, C, walk.inverse, static_cast<float>(p.eps), place, sums, mean, root);
    const T* grad_h = token<const T>(q.grad_h, q.grad_h_stride_b, q.grad_h_stride_n, N, i);
    packs([&](int j, int c) {
      widen(load_once<W>(grad_h + c), g[j]);
      float w[W], v[W];
      if (p.weight.data) {
        load_as<W>(p.weight.data, p.weight.dtype, c, w);
#pragma unroll
        for (int k = 0; k < W; ++k) w[k] += static_cast<float>(p.weight_offset);
      }
#pragma unroll
      for (int k = 0; k < W; ++k) r[j][k] = (r[j][k] - mean) * root;  // n from here on
      if (tables && q.shift.data)
#pragma unroll
        for (int k = 0; k < W; ++k) shift.sum[j][k] += g[j][k];
      if (tables && q.scale.data) {
        if (p.bias.data) load_as<W>(p.bias.data, p.bias.dtype, c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          float a = r[j][k];
          if (p.weight.data) a *= w[k];
          if (p.bias.data) a += v[k];
          scale.sum[j][k] += g[j][k] * a;
        }
      }
      if (p.scale.data) {
        load_as<W>(p.scale.data, p.scale.dtype, scales.at + c, v);
#pragma unroll
        for (int k = 0; k < W; ++k) g[j][k] *= 1.0f + v[k];
      }
      if constexpr (vectors) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
          if (q.weight.data) weight.sum[j][k] += g[j][k] * r[j][k];
          if (q.bias.data) bias.sum[j][k] += g[j][k];
        }
      }
      if (p.weight.data)
#pragma unroll
        for (int k = 0; k < W; ++k) g[j][k] *= w[k];
    });
    through_norm(g, r, root, rms);
  }

  __device__ __forceinline__ void token_gradient(int i, const TableRow& gates, const TableRow& scales) {
    const int64_t out = static_cast<int64_t>(i) * C;
    float unit[V][W] = {}, g[V][W] = {};
    const T* y = token<const T>(p.y, p.y_stride_b, p.y_stride_n, N, i);
    packs([&](int j, int c) { widen(load_once<W>(y + c), unit[j]); });
    float zero, post_root = 1;
    if (p.post_norm) {
      moments<W, V>(unit, false, C, walk.inverse, static_cast<float>(p.post_eps), place, sums, zero, post_root);
#pragma unroll
      for (int j = 0; j < V; ++j)
#pragma unroll
        for (int k = 0; k < W; ++k) unit[j][k] *= post_root;
    }
    if (q.grad_h) {
      float r[V][W] = {};
      packs([&](int j, int c) {
#pragma unroll
        for (int k = 0; k < W; ++k) r[j][k] = unit[j][k];
        if (!p.residual) return;
        weighted(r[j], c);
        float v[W];
        if (p.gate.data) {
          opened(v, gates, c);
#pragma unroll
          for (int k = 0; k < W; ++k) r[j][k] *= v[k];
        }
        const TR* residual = token<const TR>(p.residual, p.residual_stride_b, p.residual_stride_n, N, i);
        widen(load_once<W>(residual + c), v);
#pragma unroll
        for (int k = 0; k < W; ++k) r[j][k] = rounded<TR, true>(r[j][k] + v[k]);  // as the forward stored it
      });
      norm_gradient(r, g, scales, i);
      if constexpr (W * V > 8) {  // for registers: y comes from L1 once more instead of being kept
        packs([&](int j, int c) {
          widen(load_again<W>(y + c), unit[j]);
#pragma unroll
          for (int k = 0; k < W; ++k) unit[j][k] *= post_root;
        });
      }
    }
    packs([&](int j, int c) {
      float v[W];
      if (q.grad_r) {
        widen(load_once<W>(token<const TR>(q.grad_r, q.grad_r_stride_b, q.grad_r_stride_n, N, i) + c), v);
#pragma unroll
        for (int k = 0; k < W; ++k) g[j][k] += v[k];
      }
      if (q.d_residual) store_once(static_cast<TR*>(q.d_residual) + out + c, narrow<TR, W>(g[j]));
      if (!p.residual) return;
      if (p.gate.data) opened(v, gates, c);
      if (tables && q.gate.data) {
        float b[W];
#pragma unroll
        for (int k = 0; k < W; ++k) b[k] = unit[j][k];
        weighted(b, c);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float slope = p.gate_act == GateAct::tanh ? 1.0f - v[k] * v[k] : 1.0f;
          gate.sum[j][k] += g[j][k] * b[k] * slope;
        }
      }
      if (p.gate.data)
#pragma unroll
        for (int k = 0; k < W; ++k) g[j][k] *= v[k];
      if constexpr (vectors) {
        if (q.post_weight.data) {
#pragma unroll
          for (int k = 0; k < W; ++k) post.sum[j][k] += g[j][k] * unit[j][k];
        }
      }
      weighted(g[j], c);
    });
    if (!q.d_y) return;  // the same for every thread
    if (p.post_norm && p.residual) through_norm(g, unit, post_root, true);
    packs([&](int j, int c) { store_once(static_cast<T*>(q.d_y) + out + c, narrow<T, W>(g[j])); });
  }

  __device__ __forceinline__ void run() {
    TableRow gates{0, 0}, scales{0, 0};
    const Run all{0, 0, walk.rows};
    if constexpr (vectors) weight.open(all, begin), bias.open(all, begin), post.open(all, begin);
    for (int position = begin; position < end; ++position) {
      if constexpr (tables) {
        step(gate, kGate, p.gate, p.gate_row_index, position);
        step(shift, kShift, p.shift, p.row_index, position);
        step(scale, kScale, p.scale, p.row_index, position);
      }
      const int i = walk.tokens ? walk.tokens[position] : position;
      if (p.gate.data) gates = table_row(p.gate, p.gate_row_index, p.index_is_64, N, i);
      if (p.scale.data) scales = table_row(p.scale, p.row_index, p.index_is_64, N, i);
      token_gradient(i, gates, scales);
    }
    if (begin == end) return;
    if constexpr (tables) finish(gate, kGate), finish(shift, kShift), finish(scale, kScale);
    if constexpr (vectors) finish(weight, kWeight), finish(bias, kBias), finish(post, kPost);
  }
};

// The most warps of a group: 128 registers for a thread, or 168.
constexpr int warps_for(int each, int kinds) {
  return each > 8 || kinds == (kTableSums | kVectorSums) ? 12 : kMaxWarps;
}

template <class T, class TR, int W, int V, int kinds>
__global__ void __launch_bounds__(32 * warps_for(W * V, kinds))
    modulation_backward_kernel(const ModulationGradParams q, const Walk walk, int warps) {
  FASTDIT_SHARED(float[2][2][kMaxWarps], partial);
  Backward<T, TR, W, V, kinds> backward(q, walk, warps, partial);
  backward.run();
}

// ---- second stage -----------------------------------------------------------------------------------------
constexpr int kLanes = 8;  // of a block: partial rows that are summed at once

// One block per channel strip and boundary between two programs. The run across that boundary, if it begins in the
// program before it, is summed here, in the order of the programs.
__global__ void __launch_bounds__(kStrip* kLanes)
    modulation_sums_kernel(const ModulationGradParams q, const Walk walk, int table) {
  FASTDIT_SHARED(float[kLanes][kStrip], partial);
  const ModulationParams& p = q.forward;
  const TableGrad& grad = gradient(q, table);
  const int first = static_cast<int>(blockIdx.y), boundary = (first + 1) * walk.per, C = static_cast<int>(p.C);
  Run run{0, 0, walk.rows};
  if (table < kWeight)
    run = run_of_table(walk,
                       table == kGate    ? p.gate
                       : table == kShift ? p.shift
                                         : p.scale,
                       grad, table == kGate ? p.gate_row_index : p.row_index, p.index_is_64, static_cast<int>(p.N),
                       boundary);
  if (run.head >= boundary || run.head < boundary - walk.per) return;
  const int last = (run.tail - 1) / walk.per, c = static_cast<int>(blockIdx.x * kStrip + threadIdx.x);
  const float* rows = walk.partial + static_cast<int64_t>(block_of(q, table)) * walk.programs * 2 * C;
  const float total[1] = {
      strip_sum(first, last, partial, [&](int k) { return c < C ? rows[(2ll * k + (k == first)) * C + c] : 0.0f; })};
  if (threadIdx.y || c >= C) return;
  store_as<1>(grad.data, grad.dtype, static_cast<int64_t>(run.row) * C + c, total);
}

int width(const ModulationGradParams& q) {
  const ModulationParams& p = q.forward;
  const int W = pack_width(p);
  const auto whole = [&](const void* t, int dtype, std::initializer_list<int64_t> strides) {
    return !t || fits(t, static_cast<int>(itemsize(static_cast<DType>(dtype))), W, strides);
  };
  bool wide = whole(q.grad_r, p.residual_dtype, {q.grad_r_stride_b, q.grad_r_stride_n}) &&
              whole(q.grad_h, p.dtype, {q.grad_h_stride_b, q.grad_h_stride_n}) &&
              whole(q.d_residual, p.residual_dtype, {}) && whole(q.d_y, p.dtype, {});
  for (int i = 0; i < kTables; ++i) wide = wide && whole(gradient(q, i).data, gradient(q, i).dtype, {});
  return wide ? W : 1;
}

// How a backward is launched: in one pass, or with the sums of tables and of vectors in a pass each.
struct Plan {
  Geometry g;
  int kinds;  // of a pass
};

bool wants_vectors(const ModulationGradParams& q) { return q.weight.data || q.bias.data || q.post_weight.data; }

// Eight channels of a thread where the group can be that wide, else sixteen.
Plan plan(const ModulationGradParams& q) {
  const int W = width(q), both = kTableSums | kVectorSums;
  const auto fits = [&](int each, int kinds) {
    Geometry g = geometry(q.forward.C, W, {each / W});
    if (g.warps > warps_for(each, kinds)) g.warps = 0;
    return Plan{g, kinds};
  };
  const bool vectors = wants_vectors(q);
  Plan found = fits(8, vectors && W > 1 ? both : kTableSums);
  if (!found.g.warps && W > 1) found = fits(16, kTableSums);
  if (!found.g.warps) throw std::invalid_argument("modulation_backward: too many channels; got " + sizes(q.forward));
  return found;
}

template <class T, class TR, int W, int V, int kinds>
void start(const ModulationGradParams& q, const Walk& walk, const Geometry& g, Stream stream, const char* op) {
  const dim3 grid(static_cast<unsigned>((walk.programs + g.groups() - 1) / g.groups()));
  launch(modulation_backward_kernel<T, TR, W, V, kinds>, grid, dim3(g.threads()), 0, stream, op, sizes(q.forward), q,
         walk, g.warps);
}

template <class T, class TR>
void run(const ModulationGradParams& q, const Walk& walk, const Plan& how, Stream stream, const char* op) {
  constexpr int W = 16 / sizeof(T), both = kTableSums | kVectorSums;
  const Geometry& g = how.g;
  if (how.kinds == both) return start<T, TR, W, 8 / W, both>(q, walk, g, stream, op);
  if (how.kinds == kVectorSums) {
    return g.W == 1 ? start<T, TR, 1, 8, kVectorSums>(q, walk, g, stream, op)
                    : start<T, TR, W, 16 / W, kVectorSums>(q, walk, g, stream, op);
  }
  if (g.W == 1) return start<T, TR, 1, 8, kTableSums>(q, walk, g, stream, op);
  if (g.V * g.W == 8) return start<T, TR, W, 8 / W, kTableSums>(q, walk, g, stream, op);
  return start<T, TR, W, 16 / W, kTableSums>(q, walk, g, stream, op);
}

// A pass over the tokens, then the sums of runs that programs share.
void pass(const ModulationGradParams& q, const Walk& walk, const Plan& how, Stream stream, const char* op) {
  const ModulationParams& p = q.forward;
  const auto first = [&] { FASTDIT_DTYPES(p.dtype, p.residual_dtype, run, q, walk, how, stream, op) };
  first();
  if (walk.programs < 2) return;
  for (int i = 0; i < kTables; ++i) {
    const Table& t = i == kGate ? p.gate : i == kShift ? p.shift : p.scale;
    const bool whole = i < kWeight && !walk.offsets && walk.per % t.tokens_per_row == 0 && p.N % t.tokens_per_row == 0;
    if (!gradient(q, i).data || whole) continue;  // no run of it crosses a boundary
    const dim3 grid(static_cast<unsigned>((p.C + kStrip - 1) / kStrip), static_cast<unsigned>(walk.programs - 1));
    launch(modulation_sums_kernel, grid, dim3(kStrip, kLanes), 0, stream, op, sizes(p), q, walk, i);
  }
}

}  // namespace

int64_t modulation_programs(const ModulationGradParams& q, int device) {
  const Geometry g = plan(q).g;
  const int64_t rows = q.forward.B * q.forward.N, least = 4;  // tokens of a program, or its partial rows are a traffic
  const int64_t most = int64_t{processors(device)} * (1024 / g.threads() > 8 ? 8 : 1024 / g.threads()) * g.groups();
  const int64_t wanted = (rows + least - 1) / least;
  return wanted < most ? wanted : most;
}

void modulation_backward(const ModulationGradParams& q, const RowOrder& order, float* partial, Stream stream,
                         const char* op) {
  const ModulationParams& p = q.forward;
  check_tokens(p, op);
  const int64_t rows = p.B * p.N, programs = modulation_programs(q, stream.device);
  const int64_t per = (rows + programs - 1) / programs;
  const Walk walk{order.tokens,
                  order.offsets,
                  static_cast<int>(per),
                  static_cast<int>((rows + per - 1) / per),
                  static_cast<int>(rows),
                  1.0f / static_cast<float>(p.C),
                  partial};
  const Plan how = plan(q);
  ModulationGradParams one = q;
  if (how.kinds == kTableSums) one.weight.data = one.bias.data = one.post_weight.data = nullptr;
  const bool rest = wants_vectors(q) && how.kinds == kTableSums;
  if (!rest || one.d_y || one.d_residual || one.gate.data || one.shift.data || one.scale.data)
    pass(one, walk, how, stream, op);
  if (!rest) return;
  one = q;
  one.d_y = one.d_residual = one.gate.data = one.shift.data = one.scale.data = nullptr;
  pass(one, walk, {how.g, kVectorSums}, stream, op);
}

}  // namespace fastdit::cuda
