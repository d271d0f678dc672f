#include "fastdit/activation.h"

#include "../bind.h"

namespace {

fastdit::ActivationParams parameters(int64_t rows, int64_t C, int dtype, int act, int64_t x, int64_t x_stride,
                                     int64_t up, int64_t up_stride, int threads) {
  return {rows,      C,       dtype,  static_cast<fastdit::Act>(act), ptr<const void>(x), ptr<const void>(up), x_stride,
          up_stride, nullptr, threads};
}

}  // namespace

void bind_activation(py::module_& m) {
  m.def(
      "activation_forward",
      [](int64_t rows, int64_t C, int dtype, int act, int64_t x, int64_t x_stride, int64_t up, int64_t up_stride,
         int64_t y, int threads) {
        auto p = parameters(rows, C, dtype, act, x, x_stride, up, up_stride, threads);
        p.y = ptr<void>(y);
        py::gil_scoped_release release;
        fastdit::cpu::activation_forward(p);
      },
      "y = act(x) [* up]; see fastdit/activation.h.");
  m.def(
      "activation_backward",
      [](int64_t rows, int64_t C, int dtype, int act, int64_t x, int64_t x_stride, int64_t up, int64_t up_stride,
         int64_t grad, int64_t grad_stride, int64_t d_x, int64_t d_up, int threads) {
        const fastdit::ActivationGradParams q{parameters(rows, C, dtype, act, x, x_stride, up, up_stride, threads),
                                              ptr<const void>(grad), grad_stride, ptr<void>(d_x), ptr<void>(d_up)};
        py::gil_scoped_release release;
        fastdit::cpu::activation_backward(q);
      },
      "d_x = grad * up * act'(x), d_up = grad * act(x); see fastdit/activation.h.");
}
