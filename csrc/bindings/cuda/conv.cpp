#include "../../cuda/conv.h"

#include <algorithm>

#include "../../cuda/launch.h"
#include "cuda.h"

namespace fastdit::cuda {
namespace {

template <size_t count>
void integers(const py::handle& t, int64_t (&to)[count]) {
  for (size_t i = 0; i < count; ++i) to[i] = item(t, static_cast<py::ssize_t>(i));
}

// (address, dtype, sizes, strides) of a (B, C, T, H, W) tensor, or None
struct Video {
  void* data = nullptr;
  int dtype = 0;
  int64_t shape[5] = {}, stride[5] = {};
  explicit Video(const py::handle& t) {
    if (t.is_none()) return;
    data = pointer(t, 0), dtype = static_cast<int>(item(t, 1));
    integers(part(t, 2), shape), integers(part(t, 3), stride);
  }
};

// (address, dtype) of a vector, or None
void vector(const py::handle& t, const void*& data, int& dtype) {
  if (t.is_none()) return;
  data = pointer<const void>(t, 0), dtype = static_cast<int>(item(t, 1));
}

void copy(const int64_t (&from)[5], int64_t (&to)[5]) { std::copy(from, from + 5, to); }
void shape(const Video& v, NormSiluParams& p) {
  p.n = v.shape[0], p.c = v.shape[1], p.t = v.shape[2], p.h = v.shape[3], p.w = v.shape[4];
}

// (x, cache, y, kernel, stride, dilation, pads before T, H and W, time_pad, space_pad); of y only the sizes are used
ConvParams parameters(const py::tuple& a, const Video& y) {
  const Video x(part(a, 0)), cache(part(a, 1));
  ConvParams p{};
  p.x = x.data, p.cache = cache.data, p.dtype = x.dtype;
  p.n = y.shape[0], p.cin = x.shape[1], p.cout = y.shape[1], p.cache_t = cache.shape[2];
  p.t = x.shape[2], p.h = x.shape[3], p.w = x.shape[4], p.to = y.shape[2], p.ho = y.shape[3], p.wo = y.shape[4];
  copy(x.stride, p.x_stride), copy(cache.stride, p.cache_stride);
  integers(part(a, 2), p.kernel), integers(part(a, 3), p.stride), integers(part(a, 4), p.dilation);
  int64_t pad[3];
  integers(part(a, 5), pad);
  p.pad_t = pad[0], p.pad_h = pad[1], p.pad_w = pad[2];
  p.time_pad = static_cast<int>(item(a, 6)), p.space_pad = static_cast<int>(item(a, 7));
  return p;
}

ConvWeightGradParams weight_gradient_parameters(const py::tuple& shared, const py::tuple& grad) {
  const Video g(grad);
  ConvWeightGradParams q{};
  q.forward = parameters(shared, g);
  q.grad = g.data;
  copy(g.stride, q.grad_stride);
  return q;
}

// (x, norm, groups, eps, weight, bias)
NormSiluParams norm_parameters(const py::tuple& a) {
  const Video x(part(a, 0));
  NormSiluParams p{};
  p.x = x.data, p.dtype = x.dtype;
  copy(x.stride, p.x_stride);
  shape(x, p);
  p.norm = static_cast<int>(item(a, 1)), p.groups = item(a, 2), p.eps = part(a, 3).cast<double>();
  vector(part(a, 4), p.weight, p.weight_dtype), vector(part(a, 5), p.bias, p.bias_dtype);
  return p;
}

NormSiluGradParams gradient_parameters(const py::tuple& shared, const py::tuple& grad, const py::object& d_x,
                                       int silu) {
  const Video g(grad), d(d_x);
  NormSiluGradParams q{};
  q.forward = norm_parameters(shared);
  if (!q.forward.x) q.forward.dtype = g.dtype;
  shape(g, q.forward);
  q.grad = g.data, q.grad_dtype = g.dtype, q.d_x = d.data, q.silu = silu;
  copy(g.stride, q.grad_stride), copy(d.stride, q.d_x_stride);
  return q;
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def(
      "conv_forward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& taps,
         const py::object& bias, const py::object& residual, const py::tuple& out) {
        const Video y(out), r(residual);
        ConvParams p = parameters(shared, y);
        p.y = y.data, p.wide = y.dtype != p.dtype, p.residual = r.data;
        copy(y.stride, p.y_stride), copy(r.stride, p.residual_stride);
        vector(bias, p.bias, p.bias_dtype);
        const ConvTaps w{pointer<const void>(taps, 0), item(taps, 1), item(taps, 2), item(taps, 3), item(taps, 4)};
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_forward(p, w, s, op.c_str());
      },
      "y = conv(pad(cat(cache, x)), taps) + bias + residual; see fastdit/conv.h. taps: address, strides of N, T, H, "
      "W.");
  m.def(
      "conv_weight_grad_parts",
      [](int device, const py::tuple& shared, const py::tuple& grad) {
        return conv_weight_grad_parts(weight_gradient_parameters(shared, grad), device);
      },
      "In how many parts conv_weight_grad sums.");
  m.def(
      "conv_weight_grad",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grad, int64_t to,
         int parts) {
        ConvWeightGradParams q = weight_gradient_parameters(shared, grad);
        q.d_weight = ptr<void>(to);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_weight_grad(q, parts, s, op.c_str());
      },
      "to: (parts, Cout, taps, C) fp32, whose sum is the gradient of the weight.");
  m.def(
      "conv_move_weight",
      [](const py::tuple& where, const std::string& op, const py::tuple& from, const py::tuple& to, int64_t parts,
         int64_t part_stride) {
        const Video source(from), target(to);
        WeightMove w{source.data, target.data, source.dtype, target.dtype, target.shape[0], target.shape[1],
                     {},          {},          {},           parts,        part_stride};
        std::copy(target.shape + 2, target.shape + 5, w.kernel);
        copy(source.stride, w.from_stride), copy(target.stride, w.to_stride);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_move_weight(w, s, op.c_str());
      },
      "to (N, C, kt, kh, kw) = the sum over parts of from, in their order.");
  m.def(
      "conv_normalize",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::object& cache, int silu,
         int64_t stats, const py::tuple& out) {
        const Video y(out), old(cache);
        NormSiluParams p = norm_parameters(shared);
        shape(y, p);
        p.y = y.data;
        copy(y.stride, p.y_stride);
        Cache before{old.data, old.shape[2], {}};
        copy(old.stride, before.stride);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_normalize(p, before, silu, ptr<const float>(stats), s, op.c_str());
      },
      "y = act(norm(cat(cache, x))); shared: x, norm, groups, eps, weight, bias.");
  m.def("conv_processors", [](int device) { return processors(device); }, "Multiprocessors of the device.");
  m.def(
      "conv_normalize_backward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grad, int silu,
         const py::object& d_x, int64_t stats, int64_t moments, int64_t parts, int programs) {
        const NormSiluGradParams q = gradient_parameters(shared, grad, d_x, silu);
        const NormSums sums{ptr<const float>(stats), ptr<const float>(moments), ptr<float>(parts)};
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_normalize_backward(q, sums, programs, s, op.c_str());
      },
      "d_x of act(norm(x)), and parts (programs, 2, C) of the sums for weight and bias; stats, moments: of groups.");
  m.def(
      "conv_sum_rows",
      [](const py::tuple& where, const std::string& op, int64_t parts, const py::tuple& to, int64_t rows,
         int64_t columns, int64_t distance) {
        const RowSums r{
            ptr<const float>(parts), pointer(to, 0), static_cast<int>(item(to, 1)), rows, columns, distance};
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_sum_rows(r, s, op.c_str());
      },
      "to[c] = the sum over rows of parts[row * distance + c].");
  m.def(
      "conv_group_statistics",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, int64_t parts, int64_t stats,
         int programs) {
        const NormSiluParams p = norm_parameters(shared);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_group_statistics(p, ptr<float>(parts), programs, s, op.c_str());
        conv_group_combine(p, ptr<const float>(parts), ptr<float>(stats), programs, s, op.c_str());
      },
      "stats (B, 2, C): mean and 1 / deviation of each channel's group; parts (B, programs, 3, C).");
  m.def(
      "conv_group_sums",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grad, int64_t stats,
         int64_t parts, int programs) {
        const NormSiluGradParams q = gradient_parameters(shared, grad, py::none(), 1);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_group_sums(q, ptr<const float>(stats), ptr<float>(parts), programs, s, op.c_str());
      },
      "parts (B, programs, 2, C): sums of g * u and of g; without x the second, of grad itself.");
  m.def(
      "conv_group_moments",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, int64_t parts, int64_t sums,
         int64_t moments, int programs) {
        const NormSiluParams p = norm_parameters(shared);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        conv_group_moments(p, ptr<const float>(parts), ptr<float>(sums), ptr<float>(moments), programs, s, op.c_str());
      },
      "sums (B, 2, C): the parts added; moments: the means over a group of w * g * u and of w * g.");
}

}  // namespace fastdit::cuda
