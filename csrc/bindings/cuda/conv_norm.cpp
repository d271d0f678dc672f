#include "video.h"

namespace fastdit::cuda {
namespace {

void shape(const Video& v, NormSiluParams& p) {
  p.n = v.shape[0], p.c = v.shape[1], p.t = v.shape[2], p.h = v.shape[3], p.w = v.shape[4];
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

void bind_conv_norm(py::module_& m) {
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
  m.def("conv_processors", &conv_processors, "Multiprocessors of the device.");
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
