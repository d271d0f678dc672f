#include "fastdit/conv.h"

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"

namespace {

using Five = std::array<int64_t, 5>;
using Three = std::array<int64_t, 3>;

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t* to) {
  for (size_t i = 0; i < N; ++i) to[i] = from[i];
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
      [](int64_t x, int64_t cache, int64_t packed, int64_t bias, int64_t norm_weight, int64_t residual, int64_t y,
         Five x_shape, Five y_shape, int64_t cache_t, Five x_stride, Five cache_stride, Five y_stride,
         Five residual_stride, Three kernel, Three stride, Three dilation, Three pad, int time_pad, int space_pad,
         int norm, double norm_eps, int silu, int winograd, int dtype, int bias_dtype, int norm_weight_dtype,
         int threads) {
        fastdit::ConvParams p{};
        p.x = ptr<void>(x), p.cache = ptr<void>(cache), p.packed = ptr<void>(packed), p.bias = ptr<void>(bias);
        p.norm_weight = ptr<void>(norm_weight), p.residual = ptr<void>(residual), p.y = ptr<void>(y);
        p.n = x_shape[0], p.cin = x_shape[1], p.t = x_shape[2], p.h = x_shape[3], p.w = x_shape[4];
        p.cout = y_shape[1], p.to = y_shape[2], p.ho = y_shape[3], p.wo = y_shape[4], p.cache_t = cache_t;
        copy(x_stride, p.x_stride);
        copy(cache_stride, p.cache_stride);
        copy(y_stride, p.y_stride);
        copy(residual_stride, p.residual_stride);
        copy(kernel, p.kernel);
        copy(stride, p.stride);
        copy(dilation, p.dilation);
        p.pad_t = pad[0], p.pad_h = pad[1], p.pad_w = pad[2];
        p.time_pad = time_pad, p.space_pad = space_pad, p.norm = norm, p.norm_eps = norm_eps, p.silu = silu;
        p.winograd = winograd, p.dtype = dtype, p.bias_dtype = bias_dtype, p.norm_weight_dtype = norm_weight_dtype;
        p.threads = threads;
        py::gil_scoped_release release;
        fastdit::cpu::conv_forward(p);
      },
      "causal_conv3d: pointers (x, cache, packed, bias, norm_weight, residual, y), shapes, strides, geometry, codes.");
  m.def(
      "norm_silu_forward",
      [](int64_t x, int64_t weight, int64_t bias, int64_t y, Five shape, Five x_stride, Five y_stride, int64_t groups,
         int norm, double eps, int dtype, int weight_dtype, int bias_dtype, int threads) {
        fastdit::NormSiluParams p{};
        p.x = ptr<void>(x), p.weight = ptr<void>(weight), p.bias = ptr<void>(bias), p.y = ptr<void>(y);
        p.n = shape[0], p.c = shape[1], p.t = shape[2], p.h = shape[3], p.w = shape[4];
        copy(x_stride, p.x_stride);
        copy(y_stride, p.y_stride);
        p.groups = groups, p.norm = norm, p.eps = eps, p.dtype = dtype;
        p.weight_dtype = weight_dtype, p.bias_dtype = bias_dtype, p.threads = threads;
        py::gil_scoped_release release;
        fastdit::cpu::norm_silu_forward(p);
      },
      "norm_silu: pointers (x, weight, bias, y), shape, strides, groups, norm, eps, dtypes, threads.");
}
