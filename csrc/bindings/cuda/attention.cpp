#include "../../cuda/attention.h"

#include "../attention.h"
#include "cuda.h"

namespace fastdit::cuda {
namespace {

Brick brick(const py::handle& b) {
  const auto side = [&](int i) { return static_cast<int>(item(b, i)); };
  return {side(0), side(1), side(2)};
}

// (address of the plan, programs of a head, brick of queries, brick of keys)
Cut cut(const py::tuple& t) { return {pointer<const int32_t>(t, 0), item(t, 1), brick(part(t, 2)), brick(part(t, 3))}; }

// (d_o, d_lse, dq, dk, dv), each (address, strides) or None
AttentionGradParams gradient_parameters(const py::tuple& shared, const py::tuple& g) {
  AttentionGradParams p;
  fill(p, shared);
  tensor(p.d_o, p.d_o_stride, part(g, 0)), tensor(p.d_lse, p.d_lse_stride, part(g, 1));
  tensor(p.dq, p.dq_stride, part(g, 2)), tensor(p.dk, p.dk_stride, part(g, 3)), tensor(p.dv, p.dv_stride, part(g, 4));
  return p;
}

template <void (*pass)(const AttentionParams&, const Cut&, Stream, const char*)>
void forward(const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& tiles) {
  AttentionParams p;
  fill(p, shared);
  const Cut c = cut(tiles);
  const Stream s = stream(where);
  py::gil_scoped_release release;
  pass(p, c, s, op.c_str());
}

// attention_backward_keys or attention_backward_queries, for any card or for sm_90
template <void (*pass)(const AttentionGradParams&, const float*, const Cut&, Stream, const char*)>
void backward(const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grads,
              int64_t rows, const py::tuple& tiles) {
  const AttentionGradParams p = gradient_parameters(shared, grads);
  const Cut c = cut(tiles);
  const Stream s = stream(where);
  py::gil_scoped_release release;
  pass(p, ptr<const float>(rows), c, s, op.c_str());
}

// one: (address of the sums, of the counters, slots of a plane, heads together)
void one_pass(const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grads,
              int64_t rows, const py::tuple& tiles, const py::tuple& one) {
  const AttentionGradParams p = gradient_parameters(shared, grads);
  const Cut c = cut(tiles);
  const OnePass o{pointer<float>(one, 0), pointer<int32_t>(one, 1), item(one, 2), item(one, 3)};
  const Stream s = stream(where);
  py::gil_scoped_release release;
  attention_backward_one_pass_hopper(p, ptr<const float>(rows), c, o, s, op.c_str());
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention_plan",
      [](const py::tuple& where, const std::string& op, int64_t plan, int64_t cu, int64_t cu_other, int64_t grids,
         int64_t segments, int64_t rows, const py::tuple& window, const py::tuple& own) {
        PlanParams p{ptr<int32_t>(plan),
                     ptr<const int32_t>(cu),
                     ptr<const int32_t>(cu_other),
                     ptr<const int32_t>(grids),
                     segments,
                     rows,
                     {},
                     brick(own)};
        copy(p.window, window);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        attention_plan(p, s, op.c_str());
      },
      "Packed segments as tiles, the costly ones first; see cuda/attention.h.");
  m.def("attention_forward", &forward<attention_forward>,
        "o = softmax(scale * q k^T) v over the visible keys, and lse; see fastdit/attention.h.");
  m.def("attention_forward_hopper", &forward<attention_forward_hopper>, "The same on sm_90; see cuda/attention.h.");
  m.def(
      "attention_backward_rows",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, const py::tuple& grads, int64_t rows) {
        const AttentionGradParams p = gradient_parameters(shared, grads);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        attention_backward_rows(p, ptr<float>(rows), s, op.c_str());
      },
      "rows: (2, B * H * N) fp32, lse in base 2 and sum(do * o) - dlse.");
  m.def("attention_backward_keys", &backward<attention_backward_keys>, "dk and dv of attention_forward.");
  m.def("attention_backward_queries", &backward<attention_backward_queries>, "dq of attention_forward.");
  m.def("attention_backward_keys_hopper", &backward<attention_backward_keys_hopper>, "dk and dv on sm_90.");
  m.def("attention_backward_queries_hopper", &backward<attention_backward_queries_hopper>, "dq on sm_90.");
  m.def("attention_backward_one_pass_hopper", &one_pass, "dq, dk and dv on sm_90, for lines; see cuda/attention.h.");
  m.def(
      "merge_attention_forward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, py::handle o, py::handle lse) {
        MergeAttentionParams p;
        fill(p, shared);
        tensor(p.o, p.o_stride, o), tensor(p.lse, p.lse_stride, lse);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        merge_attention_forward(p, s, op.c_str());
      },
      "The attention over the union of two sets of keys; see fastdit/attention.h.");
  m.def(
      "merge_attention_backward",
      [](const py::tuple& where, const std::string& op, const py::tuple& shared, py::handle d_o, py::handle d_lse,
         py::handle d_o1, py::handle d_lse1, py::handle d_o2, py::handle d_lse2) {
        MergeAttentionGradParams p;
        fill(p, shared);
        tensor(p.d_o, p.d_o_stride, d_o), tensor(p.d_lse, p.d_lse_stride, d_lse);
        tensor(p.d_o1, p.d_o1_stride, d_o1), tensor(p.d_lse1, p.d_lse1_stride, d_lse1);
        tensor(p.d_o2, p.d_o2_stride, d_o2), tensor(p.d_lse2, p.d_lse2_stride, d_lse2);
        const Stream s = stream(where);
        py::gil_scoped_release release;
        merge_attention_backward(p, s, op.c_str());
      },
      "Every gradient of merge_attention_forward; see fastdit/attention.h.");
}

}  // namespace fastdit::cuda
