// out = rotate(n(x)) for q and k: one read and one write of each.
//
// A task is a run of tokens. A token first gives the statistics of all its heads, then a second pass over the same,
// still cached, channels normalises, rotates and stores. q and k take the token one after the other, so that a table
// row is fetched once.
#include "fastdit/rotary.h"

#include "rotary_head.h"
#include "simd.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class T>
struct Worker : Operand<T> {
  using Base = Operand<T>;
  using S = typename Base::S;
  using Base::p, Base::o, Base::weight, Base::bias, Base::mean, Base::rstd;

  HeadsFn<T> process;
  Outlet<T> outlet;

  Worker(const QkNormRopeParams& params, const RotaryOperand& operand)
      : Base(params, operand),
        process(pick<T>(params, (weight.data() != nullptr) + (bias.data() != nullptr))),
        outlet(params, operand, 2) {}

  // row: the rotation of the token where it is staged already; null: stage it here. Returns it.
  const Rotation<S>* token(int64_t b, int64_t n, Stage<S>& stage, const Rotation<S>* row) const {
    T* const out = static_cast<T*>(o.out) + b * o.out_stride[0] + n * o.out_stride[1];
    Heads<T> heads{static_cast<const T*>(o.x) + b * o.x_stride[0] + n * o.x_stride[1],
                   outlet.open(out),
                   o.heads,
                   o.x_stride[2],
                   o.out_stride[2],
                   p.head_dim,
                   weight.data(),
                   bias.data() ? bias.data() : weight.data(),
                   this->affine_stride(),
                   mean.get(),
                   rstd.get(),
                   p.all_heads ? 0 : 1,
                   outlet.by_head(),
                   n + 1 < o.tokens ? o.x_stride[1] : 0};
    this->statistics(heads.x);
    if (this->rotates(n) && this->rows_per_head()) {
      heads.count = 1;
      for (int64_t h = 0; h < o.heads; ++h) {
        process(heads, stage.dense(o.table, b, n - p.rope_start, h));
        heads.x += heads.x_stride;
        heads.y += heads.y_stride;
        heads.weight += heads.affine_stride;
        heads.bias += heads.affine_stride;
        heads.mean += heads.stat_stride;
        heads.rstd += heads.stat_stride;
      }
      outlet.close(out);
      return nullptr;
    }
    if (!row) row = this->row(b, n, stage);
    process(heads, *row);
    outlet.close(out);
    return row;
  }
};

template <class T>
void run(const QkNormRopeParams& p, const RotaryOperand& o) {
  const int64_t rows = p.batch * o.tokens;
  parallel_ranges(rows, thread_count(p, rows * o.heads * p.head_dim), [&](int64_t begin, int64_t end, int) {
    const Worker<T> worker(p, o);
    Stage<typename simd<T>::S> stage(p);
    for (int64_t r = begin; r < end; ++r) worker.token(r / o.tokens, r % o.tokens, stage, nullptr);
    finish_streams();
  });
}

template <class T>
void run_both(const QkNormRopeParams& p) {
  const int64_t rows = p.batch * p.q.tokens, heads = p.q.heads + p.k.heads;
  parallel_ranges(rows, thread_count(p, rows * heads * p.head_dim), [&](int64_t begin, int64_t end, int) {
    const Worker<T> q(p, p.q), k(p, p.k);
    Stage<typename simd<T>::S> stage(p);
    const bool shared = k.shares(q);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.q.tokens, n = r % p.q.tokens;
      const auto* row = q.token(b, n, stage, nullptr);
      k.token(b, n, stage, shared ? row : nullptr);
    }
    finish_streams();
  });
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p) {
  FASTDIT_DTYPE_SWITCH(p.dtype, T, {
    if (p.q.tokens == p.k.tokens) {
      run_both<T>(p);
    } else {
      run<T>(p, p.q);
      run<T>(p, p.k);
    }
  })
}

}  // namespace fastdit::cpu::FASTDIT_ISA
