#include "fastdit/rotary.h"

#include "../bind.h"

namespace {

// The call has some seventy ints: they are read in order from *args, which costs a fifth of pybind11's casters.
class Reader {
 public:
  explicit Reader(const py::args& args) : args_(args.ptr()), size_(static_cast<py::ssize_t>(args.size())) {}

  int64_t next() {
    if (at_ >= size_) throw py::value_error("qk_norm_rope_forward: too few arguments");
    const int64_t v = PyLong_AsLongLong(PyTuple_GET_ITEM(args_, at_++));
    if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
    return v;
  }
  void next(int64_t* values, int count) {
    for (int i = 0; i < count; ++i) values[i] = next();
  }
  int code() { return static_cast<int>(next()); }
  bool flag() { return next() != 0; }
  template <class T = void>
  T* pointer() {
    return ptr<T>(next());
  }
  void finish() const {
    if (at_ != size_) throw py::value_error("qk_norm_rope_forward: too many arguments");
  }

 private:
  PyObject* args_;
  py::ssize_t size_;
  py::ssize_t at_ = 0;
};

fastdit::RotaryOperand operand(Reader& r) {
  fastdit::RotaryOperand o{};
  o.x = r.pointer();
  o.out = r.pointer();
  o.tokens = r.next();
  o.heads = r.next();
  r.next(o.x_stride, 3);
  r.next(o.out_stride, 3);
  o.weight = r.pointer();
  o.weight_dtype = r.code();
  o.bias = r.pointer();
  o.bias_dtype = r.code();
  o.table.cos = r.pointer();
  o.table.sin = r.pointer();
  r.next(o.table.cos_stride, 4);
  r.next(o.table.sin_stride, 4);
  o.table.dtype = r.code();
  o.use_axes = r.flag();
  return o;
}

fastdit::RotaryAxes axes(Reader& r) {
  fastdit::RotaryAxes a{};
  a.count = r.code();
  if (a.count == 0) return a;
  if (a.count < 0 || a.count > 3) throw py::value_error("qk_norm_rope_forward: at most three axes");
  for (int i = 0; i < a.count; ++i) {
    a.cos[i] = r.pointer();
    a.sin[i] = r.pointer();
    a.width[i] = r.next();
  }
  a.dtype = r.code();
  a.grids = r.pointer<const int32_t>();
  a.segments = r.next();
  a.packed = r.flag();
  return a;
}

// (eps, threads, dtype, batch, head_dim, norm, all_heads, layout, rotated, rope_start, rope_len, native,
//  q: x, out, N, H, 3 + 3 strides, weight, its dtype, bias, its dtype, cos, sin, 4 + 4 strides, their dtype, use_axes,
//  k: likewise, axes: count, then if any: (cos, sin, width) each, dtype, grids, segments, packed)
void forward(double eps, const py::args& args) {
  Reader r(args);
  fastdit::QkNormRopeParams p{};
  p.eps = eps;
  p.threads = r.code();
  p.dtype = r.code();
  p.batch = r.next();
  p.head_dim = r.next();
  p.norm = static_cast<fastdit::RotaryNorm>(r.code());
  p.all_heads = r.flag();
  p.layout = static_cast<fastdit::RotaryLayout>(r.code());
  p.rotated = r.next();
  p.rope_start = r.next();
  p.rope_len = r.next();
  p.native = r.flag();
  p.q = operand(r);
  p.k = operand(r);
  p.axes = axes(r);
  r.finish();
  py::gil_scoped_release release;
  fastdit::cpu::qk_norm_rope_forward(p);
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def("qk_norm_rope_forward", &forward, "Norm and rotation of q and k; the arguments are listed at the definition.");
}
