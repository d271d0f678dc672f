// The merge of two attentions over disjoint keys, and its backward: weights once per row, rows streamed once.
#include "attention_plan.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

FASTDIT_INLINE float exponential(float x) { return __builtin_expf(x); }
FASTDIT_INLINE double exponential(double x) { return __builtin_exp(x); }
FASTDIT_INLINE float logarithm(float x) { return __builtin_logf(x); }
FASTDIT_INLINE double logarithm(double x) { return __builtin_log(x); }

// w1 + w2 = 1 and the merged lse; (0, 0, -inf) where neither side has keys.
template <class S>
struct Weights {
  S w1, w2, lse;
  Weights(S a, S b) {
    S top = a > b || a != a ? a : b;
    if (top == static_cast<S>(-__builtin_inf())) top = 0;
    w1 = exponential(a - top), w2 = exponential(b - top);
    const S total = w1 + w2, inverse = total == 0 ? S{0} : 1 / total;
    w1 *= inverse, w2 *= inverse;
    lse = top + logarithm(total);
  }
};

// fn(row of each tensor) for blocks of tokens of all heads.
template <class F>
void each_row(int64_t batch, int64_t tokens, int64_t heads, int threads, F&& fn) {
  constexpr int64_t kTokens = 16;
  const int64_t blocks = ceil_div(tokens, kTokens);
  parallel_tasks(batch * blocks, threads, [&](int64_t task, int) {
    const int64_t b = task / blocks, first = task % blocks * kTokens, last = min64(tokens, first + kTokens);
    for (int64_t token = first; token < last; ++token)
      for (int64_t h = 0; h < heads; ++h) fn(b, token, h);
  });
}

template <class T>
void merge(const MergeAttentionParams& p) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int lanes = simd<T>::width;
  each_row(p.batch, p.tokens, p.heads, p.threads, [&](int64_t b, int64_t token, int64_t h) {
    const Weights<S> w(*row<S>(p.lse1, p.lse1_stride, b, h, token), *row<S>(p.lse2, p.lse2_stride, b, h, token));
    *row<S>(p.lse, p.lse_stride, b, h, token) = w.lse;
    const T *o1 = row<T>(p.o1, p.o1_stride, b, token, h), *o2 = row<T>(p.o2, p.o2_stride, b, token, h);
    T* o = row<T>(p.o, p.o_stride, b, token, h);
    const V a = splat(w.w1), c = splat(w.w2);
    int64_t e = 0;
    for (; e + lanes <= p.head_dim; e += lanes) store(o + e, load(o1 + e) * a + load(o2 + e) * c);
    if (const int tail = static_cast<int>(p.head_dim - e))
      store_n(o + e, load_n(o1 + e, tail) * a + load_n(o2 + e, tail) * c, tail);
  });
}

//   do1 = w1 * do,   dlse1 = w1 * (w2 * do . (o1 - o2) + dlse)
//   do2 = w2 * do,   dlse2 = w2 * (w1 * do . (o2 - o1) + dlse)
template <class T>
void merge_backward(const MergeAttentionGradParams& p) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int lanes = simd<T>::width;
  each_row(p.batch, p.tokens, p.heads, p.threads, [&](int64_t b, int64_t token, int64_t h) {
    const Weights<S> w(*row<S>(p.lse1, p.lse1_stride, b, h, token), *row<S>(p.lse2, p.lse2_stride, b, h, token));
    const T *o1 = row<T>(p.o1, p.o1_stride, b, token, h), *o2 = row<T>(p.o2, p.o2_stride, b, token, h);
    const T* d_o = row<T>(p.d_o, p.d_o_stride, b, token, h);
    T* d_o1 = p.d_o1 ? row<T>(p.d_o1, p.d_o1_stride, b, token, h) : nullptr;
    T* d_o2 = p.d_o2 ? row<T>(p.d_o2, p.d_o2_stride, b, token, h) : nullptr;
    V dot = {};
    int64_t e = 0;
    for (; e + lanes <= p.head_dim; e += lanes) {
      const V g = load(d_o + e);
      dot += g * (load(o1 + e) - load(o2 + e));
      if (d_o1) store(d_o1 + e, g * w.w1);
      if (d_o2) store(d_o2 + e, g * w.w2);
    }
    if (const int tail = static_cast<int>(p.head_dim - e)) {
      const V g = load_n(d_o + e, tail);
      dot += g * (load_n(o1 + e, tail) - load_n(o2 + e, tail));
      if (d_o1) store_n(d_o1 + e, g * w.w1, tail);
      if (d_o2) store_n(d_o2 + e, g * w.w2, tail);
    }
    const S shared = sum(dot);
    const S d_lse = p.d_lse ? *row<S>(p.d_lse, p.d_lse_stride, b, h, token) : S{0};
    if (p.d_lse1) *row<S>(p.d_lse1, p.d_lse1_stride, b, h, token) = w.w1 * (w.w2 * shared + d_lse);
    if (p.d_lse2) *row<S>(p.d_lse2, p.d_lse2_stride, b, h, token) = w.w2 * (d_lse - w.w1 * shared);
  });
}

}  // namespace

void merge_attention_forward(const MergeAttentionParams& p) { FASTDIT_DTYPE_SWITCH(p.dtype, T, merge<T>(p)) }
void merge_attention_backward(const MergeAttentionGradParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, merge_backward<T>(p))
}

}  // namespace fastdit::cpu::FASTDIT_ISA
