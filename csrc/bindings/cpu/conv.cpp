#include "fastdit/conv.h"

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"

namespace {

using Five = std::array<int64_t, 5>;
using Three = std::array<int64_t, 3>;
using Two = std::array<int64_t, 2>;

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t* to) {
  for (size_t i = 0; i < N; ++i) to[i] = from[i];
}

// (kernel, stride, dilation, up, pad, time_pad, space_pad, norm, norm_eps, silu, winograd, dtype, norm_weight_dtype,
// threads): what forward and gradients share beside tensors.
fastdit::ConvParams conv_params(const py::tuple& shared) {
  fastdit::ConvParams p{};
  copy(shared[0].cast<Three>(), p.kernel);
  copy(shared[1].cast<Three>(), p.stride);
  copy(shared[2].cast<Three>(), p.dilation);
  copy(shared[3].cast<Two>(), p.up);
  const Three pad = shared[4].cast<Three>();
  p.pad_t = pad[0], p.pad_h = pad[1], p.pad_w = pad[2];
  p.time_pad = shared[5].cast<int>(), p.space_pad = shared[6].cast<int>();
  p.norm = shared[7].cast<int>(), p.norm_eps = shared[8].cast<double>(), p.silu = shared[9].cast<int>();
  p.winograd = shared[10].cast<int>();
  p.dtype = shared[11].cast<int>(), p.norm_weight_dtype = shared[12].cast<int>();
  p.threads = shared[13].cast<int>();
  return p;
}

fastdit::NormSiluParams norm_params(int64_t x, int64_t weight, int64_t bias, Five shape, Five x_stride, int64_t groups,
                                    int norm, double eps, int dtype, int weight_dtype, int bias_dtype, int threads) {
  fastdit::NormSiluParams p{};
  p.x = ptr<void>(x), p.weight = ptr<void>(weight), p.bias = ptr<void>(bias);
  p.n = shape[0], p.c = shape[1], p.t = shape[2], p.h = shape[3], p.w = shape[4];
  copy(x_stride, p.x_stride);
  p.groups = groups, p.norm = norm, p.eps = eps, p.dtype = dtype;
  p.weight_dtype = weight_dtype, p.bias_dtype = bias_dtype, p.threads = threads;
  return p;
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def(
      "conv_pack_bytes",
      [](int64_t cout, int64_t cin, Three kernel, int winograd, int dtype) {
        fastdit::ConvPackParams p{};
        int64_t bytes = 0;
        p.bytes = &bytes;
        p.cout = cout, p.cin = cin, p.winograd = winograd, p.dtype = dtype;
        copy(kernel, p.kernel);
        fastdit::cpu::conv_pack(p);
        return bytes;
      },
      "Bytes of a packed weight: cout, cin, kernel, winograd, dtype of x.");
  m.def(
      "conv_pack",
      [](int64_t weight, int64_t packed, int64_t cout, int64_t cin, Three kernel, Five stride, int winograd,
         int weight_dtype, int dtype, int threads) {
        fastdit::ConvPackParams p{};
        int64_t bytes = 0;
        p.weight = ptr<void>(weight), p.packed = ptr<void>(packed), p.bytes = &bytes;
        p.cout = cout, p.cin = cin, p.winograd = winograd;
        p.weight_dtype = weight_dtype, p.dtype = dtype, p.threads = threads;
        copy(kernel, p.kernel);
        copy(stride, p.stride);
        py::gil_scoped_release release;
        fastdit::cpu::conv_pack(p);
      },
      "Packs a (cout, cin, kt, kh, kw) weight for conv_forward on the current ISA.");
  m.def(
      "conv_hash",
      [](int64_t data, int64_t bytes, int threads) {
        uint64_t digest[2];
        {
          py::gil_scoped_release release;
          fastdit::cpu::conv_hash({ptr<void>(data), bytes, digest, threads});
        }
        return py::make_tuple(digest[0], digest[1]);
      },
      "128-bit digest of memory: data, bytes, threads.");
  m.def(
      "conv_forward",
      [](py::tuple shared, int64_t x, int64_t cache, int64_t packed, int64_t bias, int64_t norm_weight,
         int64_t residual, int64_t y, Five x_shape, Five y_shape, int64_t cache_t, Five x_stride, Five cache_stride,
         Five y_stride, Five residual_stride, int bias_dtype, int gradient, int wide) {
        fastdit::ConvParams p = conv_params(shared);
        p.x = ptr<void>(x), p.cache = ptr<void>(cache), p.packed = ptr<void>(packed), p.bias = ptr<void>(bias);
        p.norm_weight = ptr<void>(norm_weight), p.residual = ptr<void>(residual), p.y = ptr<void>(y);
        p.n = x_shape[0], p.cin = x_shape[1], p.t = x_shape[2], p.h = x_shape[3], p.w = x_shape[4];
        p.cout = y_shape[1], p.to = y_shape[2], p.ho = y_shape[3], p.wo = y_shape[4], p.cache_t = cache_t;
        copy(x_stride, p.x_stride);
        copy(cache_stride, p.cache_stride);
        copy(y_stride, p.y_stride);
        copy(residual_stride, p.residual_stride);
        p.bias_dtype = bias_dtype, p.gradient = gradient, p.wide = wide;
        py::gil_scoped_release release;
        fastdit::cpu::conv_forward(p);
      },
      "causal_conv3d: geometry, pointers (x, cache, packed, bias, norm_weight, residual, y), shapes, strides.");
  m.def(
      "conv_weight_grad",
      [](py::tuple shared, int64_t x, int64_t cache, int64_t norm_weight, int64_t grad, int64_t d_weight,
         int64_t d_bias, Five x_shape, Five y_shape, int64_t cache_t, Five x_stride, Five cache_stride,
         Five grad_stride, Five weight_stride, int weight_dtype) {
        fastdit::ConvWeightGradParams q{};
        fastdit::ConvParams& p = q.forward;
        p = conv_params(shared);
        p.x = ptr<void>(x), p.cache = ptr<void>(cache), p.norm_weight = ptr<void>(norm_weight);
        p.n = x_shape[0], p.cin = x_shape[1], p.t = x_shape[2], p.h = x_shape[3], p.w = x_shape[4];
        p.cout = y_shape[1], p.to = y_shape[2], p.ho = y_shape[3], p.wo = y_shape[4], p.cache_t = cache_t;
        copy(x_stride, p.x_stride);
        copy(cache_stride, p.cache_stride);
        q.grad = ptr<void>(grad), q.d_weight = ptr<void>(d_weight), q.d_bias = ptr<double>(d_bias);
        copy(grad_stride, q.grad_stride);
        copy(weight_stride, q.d_weight_stride);
        q.weight_dtype = weight_dtype;
        py::gil_scoped_release release;
        fastdit::cpu::conv_weight_grad(q);
      },
      "Gradients of weight and bias (float64): geometry, pointers (x, cache, norm_weight, grad, d_weight, d_bias), "
      "...");
  m.def(
      "norm_silu_forward",
      [](int64_t x, int64_t weight, int64_t bias, int64_t y, Five shape, Five x_stride, Five y_stride, int64_t groups,
         int norm, double eps, int dtype, int weight_dtype, int bias_dtype, int threads) {
        fastdit::NormSiluParams p =
            norm_params(x, weight, bias, shape, x_stride, groups, norm, eps, dtype, weight_dtype, bias_dtype, threads);
        p.y = ptr<void>(y);
        copy(y_stride, p.y_stride);
        py::gil_scoped_release release;
        fastdit::cpu::norm_silu_forward(p);
      },
      "norm_silu: pointers (x, weight, bias, y), shape, strides, groups, norm, eps, dtypes, threads.");
  m.def(
      "norm_silu_backward",
      [](int64_t x, int64_t weight, int64_t bias, int64_t grad, int64_t d_x, int64_t d_weight, int64_t d_bias,
         Five shape, Five x_stride, Five grad_stride, Five d_x_stride, int64_t groups, int norm, double eps, int silu,
         int dtype, int grad_dtype, int weight_dtype, int bias_dtype, int threads) {
        fastdit::NormSiluGradParams q{};
        q.forward =
            norm_params(x, weight, bias, shape, x_stride, groups, norm, eps, dtype, weight_dtype, bias_dtype, threads);
        q.grad = ptr<void>(grad), q.d_x = ptr<void>(d_x);
        q.d_weight = ptr<double>(d_weight), q.d_bias = ptr<double>(d_bias);
        copy(grad_stride, q.grad_stride);
        copy(d_x_stride, q.d_x_stride);
        q.silu = silu, q.grad_dtype = grad_dtype;
        py::gil_scoped_release release;
        fastdit::cpu::norm_silu_backward(q);
      },
      "Backward of norm_silu; d_weight and d_bias (float64) are added to, d_x may be grad.");
}
