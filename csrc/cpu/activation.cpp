// Activation and its gradient, one row at a time: one reading of each input, one writing of each output.
//
// GELU with tanh is x * sigmoid(2u): one exp and one division where 0.5 x (1 + tanh(u)) has the same and cancels.
#include "fastdit/activation.h"

#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr double kTwoRootTwoOverPi = 1.5957691216057308;  // 2 sqrt(2 / pi)
constexpr double kCubic = 0.044715;
constexpr double kRootHalf = 0.7071067811865476;
constexpr double kRootTwoOverPi = 0.7978845608028654;

// erf: odd polynomial below 1, 1 - exp(-x^2) P(1 / x^2) / x above (Cephes ndtr.c); 1 ulp or so.
FASTDIT_INLINE vf erf(vf x) {
  const vf a = x < 0.0f ? -x : x, z = x * x;
  vf near = splat(7.853861353153693e-5f);
  near = near * z - 8.010193625184903e-4f;
  near = near * z + 5.188327685732524e-3f;
  near = near * z - 2.685381193529856e-2f;
  near = near * z + 1.128358514861418e-1f;
  near = near * z - 3.761262582423300e-1f;
  near = (near * z + 1.128379165726710f) * x;
  const vf safe = a < 1.0f ? splat(1.0f) : a, q = 1.0f / safe, t = q * q;
  vf low = splat(2.326819970068386e-2f);  // 1 .. 2
  low = low * t - 1.387039388740657e-1f;
  low = low * t + 3.687424674597105e-1f;
  low = low * t - 5.824733027278666e-1f;
  low = low * t + 6.210004621745983e-1f;
  low = low * t - 4.944515323274145e-1f;
  low = low * t + 3.404879937665872e-1f;
  low = low * t - 2.741127028184656e-1f;
  low = low * t + 5.638259427386472e-1f;
  vf high = splat(-1.047766399936249e+1f);
  high = high * t + 1.297719955372516e+1f;
  high = high * t - 7.495518717768503e+0f;
  high = high * t + 2.921019019210786e+0f;
  high = high * t - 1.015265279202700e+0f;
  high = high * t + 4.218463358204948e-1f;
  high = high * t - 2.820767439740514e-1f;
  high = high * t + 5.641895067754075e-1f;
  const vf tail = exp(-safe * safe) * q * (a < 2.0f ? low : high);
  const vf far = x < 0.0f ? tail - 1.0f : 1.0f - tail;
  return x != x ? x : (a < 1.0f ? near : far);
}
FASTDIT_INLINE vd erf(vd x) {
  vd y;
  for (int i = 0; i < WD; ++i) y[i] = __builtin_erf(x[i]);
  return y;
}

// act(x), and its derivative when asked for.
template <class T, Act act, bool gradient, class V = typename simd<T>::V>
FASTDIT_INLINE V apply(V x, V& slope) {
  using S = typename simd<T>::S;
  if constexpr (act == Act::relu) {
    const V on = x > S(0) ? splat(S(1)) : splat(S(0));
    if (gradient) slope = on;
    return x > S(0) ? x : (x != x ? x : splat(S(0)));
  } else if constexpr (act == Act::silu) {
    const V s = sigmoid_to<T>(x);
    if (gradient) slope = s + x * s * (S(1) - s);
    return x * s;
  } else if constexpr (act == Act::gelu_tanh) {
    const V square = x * x;
    const V s = sigmoid_to<T>(x * (S(kTwoRootTwoOverPi) * (S(1) + S(kCubic) * square)));
    if (gradient) slope = s + x * s * (S(1) - s) * (S(kTwoRootTwoOverPi) * (S(1) + S(3 * kCubic) * square));
    return x * s;
  } else {
    const V cdf = S(0.5) * (S(1) + erf(x * S(kRootHalf)));
    if (gradient) slope = cdf + x * (S(0.5 * kRootTwoOverPi) * exp(x * x * S(-0.5)));
    return x * cdf;
  }
}

template <class T>
FASTDIT_INLINE typename simd<T>::V read(const T* p, int n) {
  return n == simd<T>::width ? load(p) : load_n(p, n);
}
template <class T>
FASTDIT_INLINE void write(T* p, typename simd<T>::V v, int n, bool stream) {
  n == simd<T>::width ? put(p, v, stream) : store_n(p, v, n);
}

// Whole vectors of contiguous rows may pass the caches.
template <class T>
bool streams(const void* out, int64_t rows, int64_t C) {
  constexpr int64_t bytes = simd<T>::width * sizeof(T);
  return outgrow_caches(rows * C * static_cast<int64_t>(sizeof(T))) &&
         C * static_cast<int64_t>(sizeof(T)) % bytes == 0 && reinterpret_cast<uintptr_t>(out) % bytes == 0;
}

// fn(row, column, count) over all vectors, rows shared out between the threads.
template <class T, class F>
void for_each_vector(const ActivationParams& p, bool stream, F&& fn) {
  constexpr int L = simd<T>::width;
  const int threads = p.rows * p.C < 16384 ? 1 : p.threads;  // below that a second thread costs more than it saves
  parallel_ranges(p.rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t c = 0;
      for (; c + L <= p.C; c += L) fn(i, c, L);
      if (c < p.C) fn(i, c, static_cast<int>(p.C - c));
    }
    if (stream) finish_streams();
  });
}

template <class T, Act act>
void forward(const ActivationParams& p) {
  using V = typename simd<T>::V;
  const T *x = static_cast<const T*>(p.x), *up = static_cast<const T*>(p.up);
  T* y = static_cast<T*>(p.y);
  const bool stream = streams<T>(y, p.rows, p.C);
  for_each_vector<T>(p, stream, [&](int64_t i, int64_t c, int n) {
    V unused, v = apply<T, act, false>(read(x + i * p.x_stride + c, n), unused);
    if (up) v = v * read(up + i * p.up_stride + c, n);
    write(y + i * p.C + c, v, n, stream);
  });
}

template <class T, Act act>
void backward(const ActivationGradParams& q) {
  using V = typename simd<T>::V;
  const ActivationParams& p = q.forward;
  const T *x = static_cast<const T*>(p.x), *up = static_cast<const T*>(p.up), *grad = static_cast<const T*>(q.grad);
  T *d_x = static_cast<T*>(q.d_x), *d_up = static_cast<T*>(q.d_up);
  const bool stream = streams<T>(d_x ? d_x : d_up, p.rows, p.C) && (!d_up || streams<T>(d_up, p.rows, p.C));
  for_each_vector<T>(p, stream, [&](int64_t i, int64_t c, int n) {
    V slope;
    const V v = apply<T, act, true>(read(x + i * p.x_stride + c, n), slope);
    const V g = read(grad + i * q.grad_stride + c, n);
    if (d_up) write(d_up + i * p.C + c, g * v, n, stream);
    if (d_x) write(d_x + i * p.C + c, up ? g * read(up + i * p.up_stride + c, n) * slope : g * slope, n, stream);
  });
}

template <class F>
void by_act(Act act, F&& fn) {
  switch (act) {
    case Act::gelu:
      return fn.template operator()<Act::gelu>();
    case Act::gelu_tanh:
      return fn.template operator()<Act::gelu_tanh>();
    case Act::silu:
      return fn.template operator()<Act::silu>();
    case Act::relu:
      return fn.template operator()<Act::relu>();
  }
}

}  // namespace

void activation_forward(const ActivationParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, { by_act(p.act, [&]<Act act>() { forward<T, act>(p); }); });
}

void activation_backward(const ActivationGradParams& q) {
  FASTDIT_DTYPE_SWITCH(q.forward.dtype, T, { by_act(q.forward.act, [&]<Act act>() { backward<T, act>(q); }); });
}

}  // namespace fastdit::cpu::FASTDIT_ISA
