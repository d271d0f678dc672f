#include "video.h"

namespace fastdit::cuda {
namespace {

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

// (address, strides of N, T, H, W)
ConvTaps filters(const py::tuple& t) {
  return {pointer<const void>(t, 0), item(t, 1), item(t, 2), item(t, 3), item(t, 4)};
}

// run: conv_forward or conv_forward_hopper
template <class Run>
void forward(Run&& run, const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& taps,
             const py::object& bias, const py::object& residual, const py::tuple& out) {
  const Video y(out), r(residual);
  ConvParams p = parameters(shared, y);
  p.y = y.data, p.wide = y.dtype != p.dtype, p.residual = r.data;
  copy(y.stride, p.y_stride), copy(r.stride, p.residual_stride);
  vector(bias, p.bias, p.bias_dtype);
  const ConvTaps w = filters(taps);
  const Stream s = stream(where);
  py::gil_scoped_release release;
  run(p, w, s, op.c_str());
}

// of conv_weight_grad or conv_weight_grad_hopper
template <int (*count)(const ConvWeightGradParams&, int)>
int parts(int device, const py::tuple& shared, const py::tuple& grad) {
  return count(weight_gradient_parameters(shared, grad), device);
}
template <void (*kernel)(const ConvWeightGradParams&, int, Stream, const char*)>
void weight_gradient(const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grad,
                     int64_t to, int parts) {
  ConvWeightGradParams q = weight_gradient_parameters(shared, grad);
  q.d_weight = ptr<void>(to);
  const Stream s = stream(where);
  py::gil_scoped_release release;
  kernel(q, parts, s, op.c_str());
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def(
      "conv_forward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& taps,
         const py::object& bias, const py::object& residual,
         const py::tuple& out) { forward(conv_forward, where, op, shared, taps, bias, residual, out); },
      "y = conv(pad(cat(cache, x)), taps) + bias + residual; see fastdit/conv.h. taps: address, strides of N, T, H, "
      "W.");
  m.def(
      "conv_forward_hopper",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& taps,
         const py::object& bias, const py::object& residual, const py::tuple& out, int peers) {
        const auto run = [peers](const ConvParams& p, const ConvTaps& w, Stream s, const char* name) {
          conv_forward_hopper(p, w, peers, s, name);
        };
        forward(run, where, op, shared, taps, bias, residual, out);
      },
      py::arg("where"), py::arg("op"), py::arg("shared"), py::arg("taps"), py::arg("bias"), py::arg("residual"),
      py::arg("out"), py::arg("peers") = 0,
      "The same on sm_90; see cuda/conv.h. peers: blocks that share their weights, 0 for the model to pick.");
  m.def(
      "conv_hopper_tile",
      [](int device, const py::tuple& shared, const py::tuple& taps, const py::tuple& out, int peers) {
        const ConvTile t = conv_hopper_tile(parameters(shared, Video(out)), filters(taps), peers, device);
        return py::make_tuple(t.cout, t.frames, t.lines, t.columns, t.shared, t.tiles, t.peers);
      },
      py::arg("device"), py::arg("shared"), py::arg("taps"), py::arg("out"), py::arg("peers") = 0,
      "Of conv_forward_hopper: Cout, frames, lines and columns of a tile, taps that share a patch, tiles, blocks of a "
      "cluster.");
  m.def("conv_weight_grad_parts", &parts<conv_weight_grad_parts>, "In how many parts conv_weight_grad sums.");
  m.def("conv_weight_grad_hopper_parts", &parts<conv_weight_grad_hopper_parts>, "The same on sm_90.");
  m.def("conv_weight_grad", &weight_gradient<conv_weight_grad>,
        "to: (parts, Cout, taps, C) fp32, whose sum is the gradient of the weight.");
  m.def("conv_weight_grad_hopper", &weight_gradient<conv_weight_grad_hopper>, "The same on sm_90; see cuda/conv.h.");
  m.def(
      "conv_weight_hopper_tile",
      [](int device, const py::tuple& shared, const py::tuple& grad) {
        const ConvWeightTile t = conv_weight_hopper_tile(weight_gradient_parameters(shared, grad), device);
        return py::make_tuple(t.cin, t.taps, t.lines, t.columns, t.stages, t.blocks, t.parts);
      },
      "Of conv_weight_grad_hopper: C and taps of a tile, lines and columns of its pixels, stages, blocks, parts.");
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
}

}  // namespace fastdit::cuda
