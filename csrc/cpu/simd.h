// One SIMD vocabulary for the four ISAs, on compiler vector types; include only from csrc/cpu/<family>.cpp.
//
// Everything lives in fastdit::cpu::FASTDIT_ISA. Hazard: a std:: template or plain inline function that the
// linker merges across ISAs would carry AVX-512 code into the portable path, so kernels use no std containers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "fastdit/dtype.h"
#include "fastdit/isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <omp.h>

#ifndef FASTDIT_ISA
#error "compile through CMake: FASTDIT_ISA names the namespace"
#endif

#define FASTDIT_INLINE inline __attribute__((always_inline))

namespace fastdit::cpu::FASTDIT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int W = kVectorBytes / 4;   // floats in a vector
constexpr int WD = kVectorBytes / 8;  // doubles in a vector
typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));
typedef double vd __attribute__((vector_size(kVectorBytes)));

// Arithmetic type of an element type: float for everything but double.
template <class T>
struct simd {
  using S = float;
  using V = vf;
  static constexpr int width = W;
};
template <>
struct simd<double> {
  using S = double;
  using V = vd;
  static constexpr int width = WD;
};

// ---- scalar conversions -------------------------------------------------------------------------------
FASTDIT_INLINE uint32_t as_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
FASTDIT_INLINE float from_bits(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

FASTDIT_INLINE float to_scalar(float x) { return x; }
FASTDIT_INLINE double to_scalar(double x) { return x; }
FASTDIT_INLINE float to_scalar(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTDIT_INLINE float to_scalar(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + 0x38000000u));
  const float sub = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -sub : sub;
#endif
}
template <class T>
FASTDIT_INLINE T from_scalar(typename simd<T>::S x);
template <>
FASTDIT_INLINE float from_scalar<float>(float x) {
  return x;
}
template <>
FASTDIT_INLINE double from_scalar<double>(double x) {
  return x;
}
template <>
FASTDIT_INLINE bf16 from_scalar<bf16>(float x) {
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
FASTDIT_INLINE f16 from_scalar<f16>(float x) {
#if defined(__F16C__)
  return f16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x1ffu))};
  if (a >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (a < 0x38800000u) {  // subnormal half: let the FPU round at 2^-24
    const float r = from_bits(a) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (as_bits(r) - 0x3f000000u))};
  }
  const uint32_t r = a - 0x38000000u + 0xfffu + ((a >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | (r >> 13))};
#endif
}

// ---- vectors ------------------------------------------------------------------------------------------
template <class V, class P>
FASTDIT_INLINE V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P>
FASTDIT_INLINE void store_raw(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// x - 0 is x for every x, -0 too, so that a compiler drops it; 0 + x is not, and costs an addition.
FASTDIT_INLINE vf splat(float x) { return x - vf{}; }
FASTDIT_INLINE vd splat(double x) { return x - vd{}; }

// x, rounded: a compiler may fuse a product with the sum that it goes to in one copy of a loop and not in another.
template <class S>
FASTDIT_INLINE S unfused(S x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// acc + a * b, rounded once where the ISA can: written as a sum it is rounded twice at -O1.
FASTDIT_INLINE vf multiply_add(vf acc, vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
#else
  return acc + a * b;
#endif
}
FASTDIT_INLINE vd multiply_add(vd acc, vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)acc);
#elif defined(__FMA__)
  return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)acc);
#else
  return acc + a * b;
#endif
}

FASTDIT_INLINE vf load(const float* p) { return load_raw<vf>(p); }
FASTDIT_INLINE vd load(const double* p) { return load_raw<vd>(p); }
FASTDIT_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(load_raw<vh>(p), vu) << 16);
#endif
}
FASTDIT_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const vu u = __builtin_convertvector(load_raw<vh>(p), vu), rest = u & 0x7fffu;
  const vu sub = (vu)(__builtin_convertvector((vi)rest, vf) * 5.9604644775390625e-8f);  // 2^-24
  const vu normal = (rest << 13) + 0x38000000u, special = (rest << 13) | 0x7f800000u;
  const vu finite = (vi)rest < 0x0400 ? sub : normal;
  return (vf)(((vi)rest < 0x7c00 ? finite : special) | (u & 0x8000u) << 16);
#endif
}

FASTDIT_INLINE void store(float* p, vf v) { store_raw(p, v); }
FASTDIT_INLINE void store(double* p, vd v) { store_raw(p, v); }
FASTDIT_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  store_raw(p, _mm512_cvtneps_pbh((__m512)v));
#else
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  const vu out = (nan & ((u >> 16) | 0x40u)) | (~nan & rounded);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)out));
#else
  store_raw(p, __builtin_convertvector(out, vh));
#endif
#endif
}
FASTDIT_INLINE void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const vu u = (vu)v, a = u & 0x7fffffffu;
  const vu sub = (vu)((vf)a + 0.5f) - 0x3f000000u;  // subnormal half: let the FPU round at 2^-24
  const vu normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const vu finite = (vi)a < 0x38800000 ? sub : normal;
  const vu large = (vi)a > 0x7f800000 ? 0x7e00u | (a >> 13 & 0x1ffu) : vu{} + 0x7c00u;
  store_raw(p, __builtin_convertvector(((vi)a < 0x477ff000 ? finite : large) | (u >> 16 & 0x8000u), vh));
#endif
}

// ---- stores past the caches: for outputs that none can hold until they are read again ------------------
// Writes v to p, past the caches when `stream` (p is then aligned to V).
template <class V>
FASTDIT_INLINE void put_raw(void* p, V v, bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    if (stream) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    if (stream) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    if (stream) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  }
#endif
  (void)stream;
  store_raw(p, v);
}
template <class T, class V = typename simd<T>::V>
FASTDIT_INLINE void put(T* p, V v, bool stream) {
  if (sizeof(T) * simd<T>::width < 16 || !stream) return store(p, v);
  typedef uint8_t bytes __attribute__((vector_size(sizeof(T) * simd<T>::width)));
  T narrow[simd<T>::width];
  store(narrow, v);
  put_raw(p, load_raw<bytes>(narrow), true);
}
// Streamed stores are unordered: a thread calls this once before others may read what it wrote.
FASTDIT_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first n (<= width) elements; the rest read as zero / stay untouched.
#if defined(__AVX512F__)
FASTDIT_INLINE uint32_t below(int n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); }
FASTDIT_INLINE vf load_n(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(below(n), p); }
FASTDIT_INLINE vd load_n(const double* p, int n) { return (vd)_mm512_maskz_loadu_pd(below(n), p); }
FASTDIT_INLINE vf load_n(const bf16* p, int n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(below(n), p)), 16);
}
FASTDIT_INLINE vf load_n(const f16* p, int n) { return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(below(n), p)); }
FASTDIT_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, below(n), (__m512)v); }
FASTDIT_INLINE void store_n(double* p, vd v, int n) { _mm512_mask_storeu_pd(p, below(n), (__m512d)v); }
template <class T>
FASTDIT_INLINE void store_n(T* p, vf v, int n) {
  T whole[W];
  store(whole, v);
  _mm256_mask_storeu_epi16(p, below(n), load_raw<__m256i>(whole));
}
// Lanes below n of a, the others of b.
FASTDIT_INLINE vf first_lanes(int n, vf a, vf b) { return (vf)_mm512_mask_mov_ps((__m512)b, below(n), (__m512)a); }
FASTDIT_INLINE vd first_lanes(int n, vd a, vd b) { return (vd)_mm512_mask_mov_pd((__m512d)b, below(n), (__m512d)a); }
#else
template <class T>
FASTDIT_INLINE typename simd<T>::V load_n(const T* p, int n) {
  T tmp[simd<T>::width] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load(tmp);
}
template <class T>
FASTDIT_INLINE void store_n(T* p, typename simd<T>::V v, int n) {
  T tmp[simd<T>::width];
  store(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}
template <class V>
FASTDIT_INLINE V first_lanes(int n, V a, V b) {
  for (int i = 0; i < n; ++i) b[i] = a[i];
  return b;
}
#endif

// Rounds to T and back: the "native" precision law between two elementary operations.
template <class T>
FASTDIT_INLINE typename simd<T>::V round_to(typename simd<T>::V v) {
  T tmp[simd<T>::width];
  store(tmp, v);
  return load(tmp);
}
template <>
FASTDIT_INLINE vf round_to<float>(vf v) {
  return v;
}
template <>
FASTDIT_INLINE vd round_to<double>(vd v) {
  return v;
}

FASTDIT_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
#endif
}
FASTDIT_INLINE double sum(vd v) {
  double s = 0;
  for (int i = 0; i < WD; ++i) s += v[i];
  return s;
}
#if defined(__AVX512BF16__)
// Two rows of fp32 -> one row of bf16 pairs (low[i], high[i]).
FASTDIT_INLINE __m512i zip_bf16(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif
FASTDIT_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FASTDIT_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// exp(x) by 2^n * p(r), degree 5 on |r| <= ln(2) / 2: relative error 2e-7, 0 below -87 (AVX-512: -104), inf above 88.7.
FASTDIT_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
  // second operand where one is NaN: NaN stays
  const vf y = (vf)_mm512_min_ps(_mm512_set1_ps(128.0f), _mm512_max_ps(_mm512_set1_ps(-128.0f), (__m512)x));
  const vf n = (vf)_mm512_roundscale_ps((__m512)(y * 1.44269504088896341f), 0x08);
  const vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
#else
  const vf t = x * 1.44269504088896341f;
  const vf clamped = vmin(vmax(t, splat(-126.0f)), splat(127.0f));
  const vf shifted = clamped + 12582912.0f;  // round to nearest integer in the low mantissa bits
  const vi n = (vi)shifted - 0x4b400000;
  // f * ln2, in two pieces so that no bits of x are lost
  const vf nf = shifted - 12582912.0f;
  const vf r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
#endif
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vf y = p * (vf)((n + 127) << 23);
  y = t < -126.0f ? splat(0.0f) : y;
  y = t > 128.0f ? splat(__builtin_inff()) : y;
  return x != x ? x : y;
#endif
}
FASTDIT_INLINE vd exp(vd x) {
  vd y;
  for (int i = 0; i < WD; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}
template <class V>
FASTDIT_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp(-x));
}
FASTDIT_INLINE vd sigmoid(vd x) { return 1.0 / (1.0 + exp(-x)); }
// The sigmoid of a result that will be rounded to T: 7e-5 is enough where T has 16 bits.
template <class T, class V>
FASTDIT_INLINE V sigmoid_to(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const vf t = x * -1.44269504088896341f, f = (vf)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t); 0 for +-inf
    vf p = splat(0.013534168f);
    p = p * f + 0.05201146f;
    p = p * f + 0.24144275f;
    p = p * f + 0.69300383f;
    p = p * f + 1.0000026f;
    return (vf)_mm512_rcp14_ps((__m512)(1.0f + (vf)_mm512_scalef_ps((__m512)p, (__m512)t)));
  }
#endif
  return sigmoid(x);
}
// tanh(x) = 1 - 2 / (exp(2x) + 1) away from 0; odd polynomial near it, where that cancels.
FASTDIT_INLINE vf tanh(vf x) {
  const vf x2 = x * x;
  const vf near = x * (1.0f + x2 * (-0.333332819f + x2 * (0.133282034f + x2 * -0.0519868695f)));
  const vf far = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return x2 < 0.0625f ? near : far;
}
FASTDIT_INLINE vd tanh(vd x) {
  vd y;
  for (int i = 0; i < WD; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

// ---- threads ------------------------------------------------------------------------------------------
// Splits [0, n) into one contiguous range per thread: fn(begin, end, thread). Which thread runs a range never changes
// its result. After fork() the OpenMP pool is gone, so a child runs on its own thread.
template <class F>
inline void parallel_ranges(int64_t n, int threads, F&& fn) {
  if (n <= 0) return;
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || in_forked_child()) return fn(int64_t{0}, n, 0);
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = n * t / count, end = n * (t + 1) / count;
    if (begin < end) fn(begin, end, t);
  }
}
// Hands out [0, n) one index at a time, in order (longest first when the caller sorted so): fn(index, thread).
template <class F>
inline void parallel_tasks(int64_t n, int threads, F&& fn) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || in_forked_child()) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) fn(i, omp_get_thread_num());
}

// All threads at once: fn(thread, threads, wait). wait(last) returns when all have come to it and one of them has run
// `last`.
template <class F>
inline void team(int threads, F&& fn) {
  if (threads <= 1 || in_forked_child()) return fn(0, 1, [](auto&& last) { last(); });
#pragma omp parallel num_threads(threads)
  fn(omp_get_thread_num(), omp_get_num_threads(), [](auto&& last) {
#pragma omp barrier
#pragma omp single
    last();
  });
}

// 64-byte aligned scratch with 64 bytes behind it, freed at scope exit. aligned_alloc never takes what malloc keeps at
// hand: the five of an attention cost 0.3 us.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(std::malloc(count * sizeof(T) + 128)) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  void* memory_;
  T* data_;
};

}  // namespace fastdit::cpu::FASTDIT_ISA
