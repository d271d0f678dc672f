// Softmax attention over dense batches and packed segments.
//
// A task is (sequence, key head, range of query tiles): it packs that head's keys and values once, then runs its tiles
// over the key groups they see. Which task computes a query never changes its bits.

#include "attention_plan.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

// Scratch of one thread.
struct Layout {
  int64_t channel_tiles, steps, key_groups;  // of the longest sequence
  int64_t q, k, v, p, o, zeros;              // bytes of each part
  int64_t total() const { return q + k + v + p + o + zeros + key_groups * 8; }
};

template <class M>
Layout layout_of(const AttentionParams& p, int64_t key_groups) {
  Layout l;
  constexpr int64_t word = sizeof(typename M::Word), lanes = kTileVectors * M::lanes;
  l.channel_tiles = ceil_div(p.head_dim, 8);
  l.steps = l.channel_tiles * 8 / M::pair;
  l.key_groups = ceil_div(max64(key_groups, 1), 2 * kBlockGroups<M>) * 2 * kBlockGroups<M>;
  l.q = l.steps * lanes * word;
  l.k = l.key_groups * 8 * l.steps * word;
  l.v = l.key_groups * l.channel_tiles * kValueWords<M> * word;
  l.p = kBlockGroups<M> * 8 / M::pair * lanes * word;
  l.o = l.channel_tiles * 8 * lanes * sizeof(typename M::S);
  l.zeros = ceil_div(p.head_dim, 8) * 64;
  return l;
}

template <class T, class M>
void run_tile(const AttentionParams& p, const Sequence& s, int64_t head, Tile<M>& tile, const TileBuffers<M>& buf,
              int64_t groups, const Layout& l) {
  const int vectors = static_cast<int>(ceil_div(tile.count, M::lanes)), pitch = vectors * M::lanes;
  const T* q = row<T>(p.q, p.q_stride, s.batch, s.first_q, head);
  pack_queries<M, T>(buf.q, pitch, tile.count, p.head_dim, l.steps,
                     [&](int64_t i) { return q + tile.query[i] * p.q_stride[1]; });
  // what is read and written next, while the products run: rows of this tile's output, queries about where it ends
  T* o = row<T>(p.o, p.o_stride, s.batch, s.first_q, head);
  for (int i = 0; i < tile.count; ++i) {
    ask_for_row<2>(o + tile.query[i] * p.o_stride[1], p.head_dim);
    ask_for_row<2>(q + min64(tile.query[i] + tile.count, s.n - 1) * p.q_stride[1], p.head_dim);
  }
  // the maximum is taken over s * sign(scale); scale = 0 weighs all visible keys alike
  const double c = (p.scale < 0 ? -p.scale : p.scale) * M::unit;
  if (p.scale <= 0) {
    for (int64_t i = 0; i < l.steps * pitch; ++i) buf.q[i] = p.scale < 0 ? M::negate(buf.q[i]) : typename M::Word{};
  }
  const auto scale = static_cast<typename M::S>(p.scale == 0 ? 1 : c);
  Softmax<M> softmax;
  switch (vectors) {
    case 1:
      attend_tile<M, 1>(buf, tile.view, groups, l.steps, l.channel_tiles, scale, softmax);
      break;
#if defined(__AVX512F__)
    case 2:
      attend_tile<M, 2>(buf, tile.view, groups, l.steps, l.channel_tiles, scale, softmax);
      break;
    default:
      attend_tile<M, 3>(buf, tile.view, groups, l.steps, l.channel_tiles, scale, softmax);
#endif
  }
  auto* lse = static_cast<typename M::S*>(p.lse) + s.batch * p.lse_stride[0] + head * p.lse_stride[1] + s.first_q;
  store_tile<M, T>(
      buf.o, pitch, tile.count, p.head_dim, softmax, [&](int i) { return o + tile.query[i] * p.o_stride[1]; },
      [&](int i) { return lse + tile.query[i]; }, p.lse != nullptr);
}

template <class T, class M>
void run_task(const AttentionParams& p, const Sequence& s, const Task& task, int64_t kv_head, char* scratch,
              const Layout& l) {
  using Word = typename M::Word;
  char* const at_q = scratch + l.p + l.o;
  const TileBuffers<M> buf = {reinterpret_cast<Word*>(at_q),
                              reinterpret_cast<Word*>(at_q + l.q),
                              reinterpret_cast<Word*>(at_q + l.q + l.k),
                              reinterpret_cast<Word*>(scratch),
                              reinterpret_cast<typename M::S*>(scratch + l.p),
                              reinterpret_cast<int64_t*>(at_q + l.q + l.k + l.v)};
  const T *k = row<T>(p.k, p.k_stride, s.batch, s.first_k, kv_head),
          *v = row<T>(p.v, p.v_stride, s.batch, s.first_k, kv_head);
  if (s.windowed) {  // the planes of keys that the tiles see, cubes of them side by side
    const Block first = block_of(s, task.first_tile / s.block_tiles);
    const Block last = block_of(s, (task.last_tile - 1) / s.block_tiles);
    const int64_t plane = s.cubes[1] * s.cubes[2] * 8;
    const int64_t begin = first.union_start[0] / s.cube[0] * plane / 16 * 16;
    const int64_t end = ceil_div(last.union_end[0], s.cube[0]) * plane;
    T* const zeros = reinterpret_cast<T*>(at_q + l.q + l.k + l.v + l.key_groups * 8);
    __builtin_memset(zeros, 0, l.zeros);
    const auto place = [&](const T* base, int64_t stride) {
      return [&s, base, stride, zeros](int64_t i) {
        const int64_t key = key_at(s, i);
        return key < 0 ? zeros : base + key * stride;
      };
    };
    pack_keys<M, T>(buf.k, begin, end, p.head_dim, l.steps, place(k, p.k_stride[1]));
    pack_values<M, T>(buf.v, begin, end, p.head_dim, place(v, p.v_stride[1]));
  } else {
    const int64_t end = visible_end(s, min64(s.n, tile_vector(s, task.last_tile, M::lanes) * M::lanes) - 1);
    pack_keys<M, T>(buf.k, 0, end, p.head_dim, l.steps, [&](int64_t i) { return k + i * p.k_stride[1]; });
    pack_values<M, T>(buf.v, 0, end, p.head_dim, [&](int64_t i) { return v + i * p.v_stride[1]; });
  }
  const int64_t group = p.heads / p.kv_heads;
  Tile<M> tile = {};
  for (int64_t index = task.first_tile; index < task.last_tile; ++index) {
    tile_of<M>(s, index, tile);
    if (tile.count == 0) continue;
    const int64_t groups = groups_of(s, index, M::lanes, 0, l.key_groups, buf.groups);
    for (int64_t h = 0; h < group; ++h) run_tile<T, M>(p, s, kv_head * group + h, tile, buf, groups, l);
  }
}

// Packed rows behind the last segment see no keys.
template <class T, class S>
void clear_tail(const AttentionParams& p) {
  for (int64_t token = p.cu_q[p.batch]; token < p.q_len; ++token) {
    for (int64_t h = 0; h < p.heads; ++h) {
      T* to = row<T>(p.o, p.o_stride, 0, token, h);
      for (int64_t c = 0; c < p.head_dim; ++c) to[c] = T{};
      if (p.lse) static_cast<S*>(p.lse)[h * p.lse_stride[1] + token] = static_cast<S>(-__builtin_inf());
    }
  }
}

template <class T>
void run(const AttentionParams& p) {
  using M = typename MathFor<T>::type;
  Scratch<Sequence> sequences(p.batch);
  Scratch<int64_t> order(p.batch);
  Scratch<double> costs(p.batch);
  double total = 0;
  int64_t key_groups = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence s = sequences.get()[i] = sequence_of(p, i, M::lanes);
    costs.get()[i] = s.cost;
    total += s.cost;
    key_groups = max64(key_groups, s.key_groups);
  }
  sort_by_cost(costs.get(), order.get(), p.batch);
  const double cost_of_task = __builtin_fmax(1, total * static_cast<double>(p.kv_heads) / (8.0 * p.threads));
  const int64_t idle = ceil_div(p.threads, p.kv_heads * p.batch);
  int64_t count = 0;
  for (int64_t i = 0; i < p.batch; ++i) count += tasks_in(sequences.get()[i], cost_of_task, idle);
  Scratch<Task> tasks(count);
  count = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t index = order.get()[i];
    const Sequence& s = sequences.get()[index];
    const int64_t parts = tasks_in(s, cost_of_task, idle);
    for (int64_t part = 0; part < parts; ++part)
      tasks.get()[count++] = Task{index, s.tiles * part / parts, s.tiles * (part + 1) / parts};
  }
  const Layout l = layout_of<M>(p, key_groups);
  const int64_t pitch = ceil_div(l.total(), 64) * 64;
  const int64_t work = count * p.kv_heads;
  const int threads = static_cast<int>(max64(1, min64(p.threads, work)));
  Scratch<char> scratch(pitch * threads);
  parallel_tasks(work, threads, [&](int64_t i, int thread) {
    const Task& task = tasks.get()[i / p.kv_heads];
    run_task<T, M>(p, sequences.get()[task.sequence], task, i % p.kv_heads, scratch.get() + pitch * thread, l);
  });
  if (p.cu_q) clear_tail<T, typename M::S>(p);
}

}  // namespace

void attention_forward(const AttentionParams& p) { FASTDIT_DTYPE_SWITCH(p.dtype, T, run<T>(p)) }

}  // namespace fastdit::cpu::FASTDIT_ISA
