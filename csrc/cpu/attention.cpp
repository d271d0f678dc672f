// Softmax attention over dense batches and packed segments, and the merge of two partial results.
//
// A task is (sequence, key head, range of query tiles): it packs that head's keys and values once, then runs its tiles
// over the key groups they see. Which task computes a query never changes its bits.
#include "fastdit/attention.h"

#include "attention_plan.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

template <class T>
const T* row(const void* base, const int64_t (&stride)[3], int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(base) + batch * stride[0] + token * stride[1] + head * stride[2];
}

// Scratch of one thread.
struct Layout {
  int64_t channel_tiles, steps, key_groups;  // of the longest sequence
  int64_t q, k, v, s, o;                     // bytes of each part
  int64_t total() const { return q + k + v + s + o + key_groups * 8; }
};

template <class M>
Layout layout_of(const AttentionParams& p, int64_t longest) {
  Layout l;
  constexpr int64_t word = sizeof(typename M::Word), lanes = kTileVectors * M::lanes;
  l.channel_tiles = ceil_div(p.head_dim, 8);
  l.steps = l.channel_tiles * 8 / M::pair;
  l.key_groups = ceil_div(max64(longest, 1), 2 * kKeyBlock) * 2 * kBlockGroups;
  l.q = l.steps * lanes * word;
  l.k = l.key_groups * 8 * l.steps * word;
  l.v = l.key_groups * l.channel_tiles * kValueWords<M> * word;
  l.s = kKeyBlock * lanes * sizeof(typename M::S);
  l.o = l.channel_tiles * 8 * lanes * sizeof(typename M::S);
  return l;
}

template <class T, class M>
void run_tile(const AttentionParams& p, const Sequence& s, int64_t head, Tile<M>& tile, const TileBuffers<M>& buf,
              const Layout& l) {
  const int vectors = static_cast<int>(ceil_div(tile.count, M::lanes)), pitch = vectors * M::lanes;
  const T* q = row<T>(p.q, p.q_stride, s.batch, s.first_q, head);
  pack_queries<M, T>(buf.q, pitch, tile.count, p.head_dim, l.steps,
                     [&](int64_t i) { return q + tile.query[i] * p.q_stride[1]; });
  // the maximum is taken over s * sign(scale); scale = 0 weighs all visible keys alike
  const double c = (p.scale < 0 ? -p.scale : p.scale) * M::unit;
  if (p.scale <= 0) {
    for (int64_t i = 0; i < l.steps * pitch; ++i) buf.q[i] = p.scale < 0 ? M::negate(buf.q[i]) : typename M::Word{};
  }
  const auto scale = static_cast<typename M::S>(p.scale == 0 ? 1 : c);
  alignas(64) typename M::S sums[kTileVectors * M::lanes], shifts[kTileVectors * M::lanes];
  switch (vectors) {
    case 1:
      attend_tile<M, 1>(buf, tile.view, tile.groups, l.steps, l.channel_tiles, scale, sums, shifts);
      break;
#if defined(__AVX512F__)
    case 2:
      attend_tile<M, 2>(buf, tile.view, tile.groups, l.steps, l.channel_tiles, scale, sums, shifts);
      break;
    default:
      attend_tile<M, 3>(buf, tile.view, tile.groups, l.steps, l.channel_tiles, scale, sums, shifts);
#endif
  }
  T* o = const_cast<T*>(row<T>(p.o, p.o_stride, s.batch, s.first_q, head));
  auto* lse = static_cast<typename M::S*>(p.lse) + s.batch * p.lse_stride[0] + head * p.lse_stride[1] + s.first_q;
  store_tile<M, T>(
      buf.o, pitch, tile.count, p.head_dim, sums, shifts, [&](int i) { return o + tile.query[i] * p.o_stride[1]; },
      [&](int i) { return lse + tile.query[i]; }, p.lse != nullptr);
}

template <class T, class M>
void run_task(const AttentionParams& p, const Task& task, int64_t kv_head, char* scratch, const Layout& l) {
  using Word = typename M::Word;
  const Sequence s = sequence_of(p, task.sequence, M::lanes);
  const TileBuffers<M> buf = {reinterpret_cast<Word*>(scratch + l.s + l.o),
                              reinterpret_cast<Word*>(scratch + l.s + l.o + l.q),
                              reinterpret_cast<Word*>(scratch + l.s + l.o + l.q + l.k),
                              reinterpret_cast<typename M::S*>(scratch),
                              reinterpret_cast<typename M::S*>(scratch + l.s),
                              reinterpret_cast<int64_t*>(scratch + l.s + l.o + l.q + l.k + l.v)};
  const int64_t keys =
      s.windowed ? s.m : visible_end(s, min64(s.n, tile_vector(s, task.last_tile, M::lanes) * M::lanes) - 1);
  pack_keys<M, T>(buf.k, row<T>(p.k, p.k_stride, s.batch, s.first_k, kv_head), p.k_stride[1], keys, p.head_dim,
                  l.steps);
  pack_values<M, T>(buf.v, row<T>(p.v, p.v_stride, s.batch, s.first_k, kv_head), p.v_stride[1], keys, p.head_dim);
  const int64_t group = p.heads / p.kv_heads;
  Tile<M> tile = {};
  for (int64_t index = task.first_tile; index < task.last_tile; ++index) {
    if (s.windowed)
      plan_window<M>(s, index, tile, buf.groups);
    else
      plan_plain<M>(s, index, tile, buf.groups);
    for (int64_t h = 0; h < group; ++h) run_tile<T, M>(p, s, kv_head * group + h, tile, buf, l);
  }
}

// Packed rows behind the last segment see no keys.
template <class T, class S>
void clear_tail(const AttentionParams& p) {
  for (int64_t token = p.cu_q[p.batch]; token < p.q_len; ++token) {
    for (int64_t h = 0; h < p.heads; ++h) {
      T* to = const_cast<T*>(row<T>(p.o, p.o_stride, 0, token, h));
      for (int64_t c = 0; c < p.head_dim; ++c) to[c] = T{};
      if (p.lse) static_cast<S*>(p.lse)[h * p.lse_stride[1] + token] = static_cast<S>(-__builtin_inf());
    }
  }
}

template <class T>
void run(const AttentionParams& p) {
  using M = typename MathFor<T>::type;
  // longest sequences first, by insertion of an index list: shell sort
  Scratch<int64_t> order(p.batch), costs(p.batch);
  double total = 0;
  int64_t longest = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence s = sequence_of(p, i, M::lanes);
    order.get()[i] = i;
    costs.get()[i] = s.n * s.m;
    total += static_cast<double>(s.n) * static_cast<double>(s.m);
    longest = max64(longest, s.m);
  }
  for (int64_t gap = p.batch / 2; gap > 0; gap /= 2) {
    for (int64_t i = gap; i < p.batch; ++i) {
      const int64_t index = order.get()[i];
      int64_t j = i;
      for (; j >= gap && costs.get()[order.get()[j - gap]] < costs.get()[index]; j -= gap)
        order.get()[j] = order.get()[j - gap];
      order.get()[j] = index;
    }
  }
  const double cost_of_task =
      max64(1, static_cast<int64_t>(total * static_cast<double>(p.kv_heads) / (8.0 * p.threads)));
  int64_t count = 0;
  for (int64_t i = 0; i < p.batch; ++i) count += tasks_in(sequence_of(p, i, M::lanes), cost_of_task);
  Scratch<Task> tasks(count);
  count = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t index = order.get()[i];
    const Sequence s = sequence_of(p, index, M::lanes);
    const int64_t parts = tasks_in(s, cost_of_task);
    for (int64_t part = 0; part < parts; ++part)
      tasks.get()[count++] = Task{index, s.tiles * part / parts, s.tiles * (part + 1) / parts};
  }
  const Layout l = layout_of<M>(p, longest);
  const int64_t pitch = ceil_div(l.total(), 64) * 64;
  const int64_t work = count * p.kv_heads;
  const int threads = static_cast<int>(max64(1, min64(p.threads, work)));
  Scratch<char> scratch(pitch * threads);
  parallel_tasks(work, threads, [&](int64_t i, int thread) {
    run_task<T, M>(p, tasks.get()[i / p.kv_heads], i % p.kv_heads, scratch.get() + pitch * thread, l);
  });
  if (p.cu_q) clear_tail<T, typename M::S>(p);
}

// o = w1 * o1 + w2 * o2 with the weights of a block of tokens at a time.
template <class T>
void merge(const MergeAttentionParams& p) {
  using S = typename simd<T>::S;
  using V = typename simd<T>::V;
  constexpr int lanes = simd<T>::width;
  const int64_t blocks = ceil_div(p.tokens, lanes);
  parallel_tasks(p.batch * blocks, p.threads, [&](int64_t task, int) {
    const int64_t b = task / blocks, first = task % blocks * lanes, count = min64(lanes, p.tokens - first);
    for (int64_t h = 0; h < p.heads; ++h) {
      S w1[lanes] = {}, w2[lanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const auto at = [&](const int64_t (&s)[3]) { return b * s[0] + h * s[1] + (first + i) * s[2]; };
        const S a = static_cast<const S*>(p.lse1)[at(p.lse1_stride)],
                c = static_cast<const S*>(p.lse2)[at(p.lse2_stride)];
        S top = a > c || a != a ? a : c;
        if (top == static_cast<S>(-__builtin_inf())) top = 0;
        w1[i] = static_cast<S>(sizeof(S) == 8 ? __builtin_exp(a - top) : __builtin_expf(static_cast<float>(a - top)));
        w2[i] = static_cast<S>(sizeof(S) == 8 ? __builtin_exp(c - top) : __builtin_expf(static_cast<float>(c - top)));
        const S total = w1[i] + w2[i], inverse = total == 0 ? S{0} : 1 / total;
        w1[i] *= inverse;
        w2[i] *= inverse;
        static_cast<S*>(p.lse)[at(p.lse_stride)] =
            top + static_cast<S>(sizeof(S) == 8 ? __builtin_log(total) : __builtin_logf(static_cast<float>(total)));
      }
      for (int64_t i = 0; i < count; ++i) {
        const T *o1 = row<T>(p.o1, p.o1_stride, b, first + i, h), *o2 = row<T>(p.o2, p.o2_stride, b, first + i, h);
        T* o = const_cast<T*>(row<T>(p.o, p.o_stride, b, first + i, h));
        const V a = splat(w1[i]), c = splat(w2[i]);
        int64_t e = 0;
        for (; e + lanes <= p.head_dim; e += lanes) store(o + e, load(o1 + e) * a + load(o2 + e) * c);
        if (const int tail = static_cast<int>(p.head_dim - e))
          store_n(o + e, load_n(o1 + e, tail) * a + load_n(o2 + e, tail) * c, tail);
      }
    }
  });
}

}  // namespace

void attention_forward(const AttentionParams& p) { FASTDIT_DTYPE_SWITCH(p.dtype, T, run<T>(p)) }
void merge_attention_forward(const MergeAttentionParams& p) { FASTDIT_DTYPE_SWITCH(p.dtype, T, merge<T>(p)) }

}  // namespace fastdit::cpu::FASTDIT_ISA
