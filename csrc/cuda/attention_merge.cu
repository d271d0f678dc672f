// Two attentions of the same queries over disjoint keys become one; element-wise, one pass.
//
//   lse = log(exp(lse1) + exp(lse2)),   a = exp(lse1 - lse),  b = exp(lse2 - lse);   o = a * o1 + b * o2
//   do1 = a * do,   dlse1 = a * (dlse + b * do . (o1 - o2))
//   do2 = b * do,   dlse2 = b * (dlse - a * do . (o1 - o2))
//
// Sixteen lanes take a row (token, head), the head fastest. Bytes: 3 rows of o forward, 5 backward, and the lse.
#include "attention.h"
#include "launch.h"
#include "packs.h"

namespace fastdit::cuda {
namespace {

constexpr int kThreads = 256, kLanes = 16, kRows = kThreads / kLanes;

// A row, and this thread's lane in it.
struct Place {
  int lane;
  int64_t batch, token, head;
  bool there;
  __device__ explicit Place(const MergeAttentionParams& p) : lane(static_cast<int>(threadIdx.x) % kLanes) {
    const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes, token_row = row / p.heads;
    batch = token_row / p.tokens, token = token_row % p.tokens, head = row % p.heads, there = batch < p.batch;
  }
  template <class T>
  __device__ T* row(const void* t, const int64_t (&stride)[3]) const {  // batch, token, head
    return const_cast<T*>(static_cast<const T*>(t)) + batch * stride[0] + token * stride[1] + head * stride[2];
  }
  __device__ float& lse(const void* t, const int64_t (&stride)[3]) const {  // batch, head, token
    return const_cast<float*>(static_cast<const float*>(t))[batch * stride[0] + head * stride[1] + token * stride[2]];
  }
};

// a + b = 1 and the merged lse; (0, 0, -inf) where neither side has keys.
struct Shares {
  float a, b, lse;
  __device__ Shares(float lse1, float lse2) {
    float top = lse1 > lse2 || lse1 != lse1 ? lse1 : lse2;
    if (top == -INFINITY) top = 0;
    a = expf(lse1 - top), b = expf(lse2 - top);
    const float total = a + b, share = total == 0 ? 0.0f : 1 / total;
    a *= share, b *= share;
    lse = top + logf(total);
  }
};

template <class T, int W>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeAttentionParams p) {
  const Place place(p);
  if (!place.there) return;
  const Shares share(place.lse(p.lse1, p.lse1_stride), place.lse(p.lse2, p.lse2_stride));
  if (place.lane == 0) place.lse(p.lse, p.lse_stride) = share.lse;
  const T *o1 = place.row<const T>(p.o1, p.o1_stride), *o2 = place.row<const T>(p.o2, p.o2_stride);
  T* o = place.row<T>(p.o, p.o_stride);
  for (int64_t c = place.lane * W; c < p.head_dim; c += kLanes * W) {
    float x[W], y[W];
    widen(load_once<W>(o1 + c), x), widen(load_once<W>(o2 + c), y);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = share.a * x[k] + share.b * y[k];
    store_once(o + c, narrow<T, W>(x));
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads) merge_backward_kernel(const MergeAttentionGradParams p) {
  const Place place(p);
  if (!place.there) return;
  const Shares share(place.lse(p.lse1, p.lse1_stride), place.lse(p.lse2, p.lse2_stride));
  float apart = 0;
  const T *o1 = place.row<const T>(p.o1, p.o1_stride), *o2 = place.row<const T>(p.o2, p.o2_stride);
  const T* d_o = place.row<const T>(p.d_o, p.d_o_stride);
  for (int64_t c = place.lane * W; c < p.head_dim; c += kLanes * W) {
    float g[W], x[W], y[W];
    widen(load_once<W>(d_o + c), g), widen(load_once<W>(o1 + c), x), widen(load_once<W>(o2 + c), y);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      apart += g[k] * (x[k] - y[k]);
      x[k] = share.a * g[k], y[k] = share.b * g[k];
    }
    if (p.d_o1) store_once(place.row<T>(p.d_o1, p.d_o1_stride) + c, narrow<T, W>(x));
    if (p.d_o2) store_once(place.row<T>(p.d_o2, p.d_o2_stride) + c, narrow<T, W>(y));
  }
  const unsigned lanes = 0xffffu << (threadIdx.x % 32 / kLanes * kLanes);  // the other row of the warp may be none
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) apart += __shfl_xor_sync(lanes, apart, step);
  if (place.lane) return;
  const float d_lse = p.d_lse ? place.lse(p.d_lse, p.d_lse_stride) : 0.0f;
  if (p.d_lse1) place.lse(p.d_lse1, p.d_lse1_stride) = share.a * (d_lse + share.b * apart);
  if (p.d_lse2) place.lse(p.d_lse2, p.d_lse2_stride) = share.b * (d_lse - share.a * apart);
}

// Whether rows may be read in 16 bytes.
template <class P>
bool wide(const P& p, int itemsize) {
  const int W = 16 / itemsize;
  const auto whole = [&](const void* t, const int64_t (&s)[3]) {
    return !t || fits(t, itemsize, W, {s[0], s[1], s[2]});
  };
  bool all = p.head_dim % W == 0 && whole(p.o1, p.o1_stride) && whole(p.o2, p.o2_stride);
  if constexpr (std::is_same_v<P, MergeAttentionGradParams>)
    return all && whole(p.d_o, p.d_o_stride) && whole(p.d_o1, p.d_o1_stride) && whole(p.d_o2, p.d_o2_stride);
  else
    return all && whole(p.o, p.o_stride);
}

template <class T, class P>
void run(const P& p, Stream stream, const char* op) {
  constexpr int W = 16 / sizeof(T);
  const bool packs = wide(p, sizeof(T));
  const int64_t blocks = (p.batch * p.tokens * p.heads + kRows - 1) / kRows;
  const auto kernel = [&] {
    if constexpr (std::is_same_v<P, MergeAttentionGradParams>)
      return packs ? merge_backward_kernel<T, W> : merge_backward_kernel<T, 1>;
    else
      return packs ? merge_kernel<T, W> : merge_kernel<T, 1>;
  }();
  const std::string sizes = "B=" + std::to_string(p.batch) + " N=" + std::to_string(p.tokens) +
                            " H=" + std::to_string(p.heads) + " D=" + std::to_string(p.head_dim);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, op, sizes, p);
}

template <class P>
void merge(const P& p, Stream stream, const char* op) {
  FASTDIT_DTYPE(p.dtype, run, p, stream, op)
}

}  // namespace

void merge_attention_forward(const MergeAttentionParams& p, Stream stream, const char* op) { merge(p, stream, op); }
void merge_attention_backward(const MergeAttentionGradParams& p, Stream stream, const char* op) {
  merge(p, stream, op);
}

}  // namespace fastdit::cuda
