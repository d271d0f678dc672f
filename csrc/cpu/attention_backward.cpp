// Attention backward: P is taken again from lse, so nothing of size N x M is ever stored.
//
//   P = exp(scale * q k - lse),  delta = sum(do * o) - dlse,  dS = P * (do v - delta)
//   dv = P^T do,   dk = scale * dS^T q,   dq = scale * dS k
//
// A task is (sequence, key head, part of its key blocks). It packs its queries once, then goes through its key blocks:
// dK and dV of a block are complete when its queries are done; dQ of all queries grows over the blocks. Where few
// heads leave too few tasks, a head's key blocks are split into parts whose dQ are added in order afterwards. How many
// parts is a matter of the shapes alone, so the bits do not depend on threads.
#include <type_traits>

#include "attention_grad.h"
#include "attention_plan.h"

namespace fastdit::cpu::FASTDIT_ISA {
namespace {

constexpr int64_t kTasksWanted = 16;

struct GradTask {
  int64_t sequence, part;
};

// Sizes that all tasks of a call share, and where a thread's scratch holds what.
template <class M>
struct GradLayout {
  using S = typename M::S;
  using Word = typename M::Word;
  int64_t steps, channel_tiles, pitch;  // channel words; tiles of 8 channels; channels padded to whole vectors
  int64_t tiles, heads, dim;            // most tiles of a sequence; query heads of a key head
  bool whole;                           // some sequence is not split: its dq grows in the scratch

  int64_t dq_size() const { return channel_tiles * 8 * kLanes<M>; }

  struct Part {
    QueryTile<M> tiles;  // of tile 0; the next lies `size` further
    KeyBlock<M> block;
    int64_t *groups, *seen;  // seen: first and last group of each tile
    char* zeros;
    int64_t bytes;
  };
  Part carve(char* memory) const {
    int64_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(memory + used);
      used += ceil_div(count * static_cast<int64_t>(sizeof(*p)), 64) * 64;
    };
    constexpr int64_t keys = kBlockGroups<M> * 8;
    const int64_t all = tiles * heads;
    Part s;
    take(s.block.k, keys * steps), take(s.block.v, keys * steps);
    take(s.block.k_columns, channel_tiles * kBlockGroups<M> * kValueWords<M>);
    take(s.block.dk, keys * pitch), take(s.block.dv, keys * pitch);
    take(s.block.ds, keys * kRowWords<M>);
    if constexpr (M::pair == 2) {
      take(s.block.weights, 24 * kLanes<M>);
      take(s.block.p, keys * kRowWords<M>), take(s.block.ds_columns, keys * kRowWords<M>);
    } else {
      take(s.block.weights, keys * kLanes<M>);
      s.block.p = s.block.weights, s.block.ds_columns = s.block.ds;
    }
    take(s.groups, kBlockGroups<M>);
    take(s.seen, 2 * tiles);
    take(s.zeros, ceil_div(dim, 8) * 64);
    take(s.tiles.q, all * steps * kLanes<M>), take(s.tiles.d_o, all * steps * kLanes<M>);
    take(s.tiles.q_rows, all * kRowWords<M> * pitch), take(s.tiles.d_o_rows, all * kRowWords<M> * pitch);
    take(s.tiles.shift, all * kLanes<M>), take(s.tiles.delta, all * kLanes<M>);
    take(s.tiles.dq, whole ? all * dq_size() : 0);
    s.bytes = used;
    return s;
  }
  QueryTile<M> at(const QueryTile<M>& t, int64_t index) const {
    return {t.q + index * steps * kLanes<M>,
            t.d_o + index * steps * kLanes<M>,
            t.q_rows + index * kRowWords<M> * pitch,
            t.d_o_rows + index * kRowWords<M> * pitch,
            t.shift + index * kLanes<M>,
            t.delta + index * kLanes<M>,
            t.dq + index * dq_size()};
  }
};

template <class T>
typename simd<T>::S dot(const T* a, const T* b, int64_t count) {
  constexpr int lanes = simd<T>::width;
  typename simd<T>::V acc = {};
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) acc += load(a + c) * load(b + c);
  if (const int tail = static_cast<int>(count - c)) acc += load_n(a + c, tail) * load_n(b + c, tail);
  return sum(acc);
}

template <class T, class M>
void pack_tile(const AttentionGradParams& p, const Sequence& s, int64_t head, const Tile<M>& tile,
               const QueryTile<M>& to, const GradLayout<M>& l) {
  using S = typename M::S;
  const int pitch = static_cast<int>(ceil_div(tile.count, M::lanes)) * M::lanes;
  const T *q = row<T>(p.q, p.q_stride, s.batch, s.first_q, head),
          *o = row<T>(p.o, p.o_stride, s.batch, s.first_q, head);
  const T* d_o = row<T>(p.d_o, p.d_o_stride, s.batch, s.first_q, head);
  const auto q_row = [&](int64_t i) { return q + tile.query[i] * p.q_stride[1]; };
  const auto d_o_row = [&](int64_t i) { return d_o + tile.query[i] * p.d_o_stride[1]; };
  pack_queries<M, T>(to.q, pitch, tile.count, p.head_dim, l.steps, q_row);
  pack_queries<M, T>(to.d_o, pitch, tile.count, p.head_dim, l.steps, d_o_row);
  pack_rows<M, T>(to.q_rows, l.pitch, tile.count, p.head_dim, q_row);
  pack_rows<M, T>(to.d_o_rows, l.pitch, tile.count, p.head_dim, d_o_row);
  const S* lse = static_cast<const S*>(p.lse) + s.batch * p.lse_stride[0] + head * p.lse_stride[1] + s.first_q;
  constexpr S infinity = static_cast<S>(__builtin_inf());
  for (int i = 0; i < pitch; ++i) {
    to.shift[i] = infinity, to.delta[i] = 0;  // power(-inf) = 0: lanes without a query, queries without keys
    if (i >= tile.count || lse[tile.query[i]] == -infinity) continue;
    to.shift[i] = lse[tile.query[i]] * static_cast<S>(M::unit);
    to.delta[i] = dot(d_o_row(i), o + tile.query[i] * p.o_stride[1], p.head_dim);
    if (p.d_lse) to.delta[i] -= *row<S>(p.d_lse, p.d_lse_stride, s.batch, head, s.first_q + tile.query[i]);
  }
}

template <class T, class S>
void store_row(T* to, const S* from, int64_t dim, S factor) {
  constexpr int lanes = simd<T>::width;
  using V = typename simd<T>::V;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) store(to + c, load_raw<V>(from + c) * factor);
  if (const int tail = static_cast<int>(dim - c)) store_n(to + c, load_raw<V>(from + c) * factor, tail);
}

template <class T, class M>
void store_queries(const AttentionGradParams& p, const Sequence& s, int64_t head, int64_t index,
                   const typename M::S* dq) {
  Tile<M> tile;
  tile_of<M>(s, index, tile);
  typename M::S factors[kLanes<M>];
  for (auto& f : factors) f = static_cast<typename M::S>(p.scale);
  T* to = row<T>(p.dq, p.dq_stride, s.batch, s.first_q, head);
  store_columns<M, T>(dq, static_cast<int>(ceil_div(tile.count, M::lanes)) * M::lanes, tile.count, p.head_dim, factors,
                      [&](int i) { return to + tile.query[i] * p.dq_stride[1]; });
}

template <class T, class M>
void run_part(const AttentionGradParams& p, const Sequence& s, int64_t kv_head, int64_t part, int64_t parts,
              char* memory, const GradLayout<M>& l, typename M::S* partial) {
  using S = typename M::S;
  auto scratch = l.carve(memory);
  const auto& block = scratch.block;
  if (partial) scratch.tiles.dq = partial;
  __builtin_memset(scratch.zeros, 0, ceil_div(l.dim, 8) * 64);
  const int64_t blocks = ceil_div(s.key_groups, kBlockGroups<M>);
  const int64_t first_block = blocks * part / parts, last_block = blocks * (part + 1) / parts;
  Tile<M> tile;
  for (int64_t index = 0; index < s.tiles; ++index) {
    int64_t* seen = scratch.seen + 2 * index;
    span_of(s, index, M::lanes, seen[0], seen[1]);
    if (seen[0] >= last_block * kBlockGroups<M> || seen[1] <= first_block * kBlockGroups<M>) continue;
    tile_of<M>(s, index, tile);
    for (int64_t h = 0; h < l.heads; ++h)
      pack_tile<T, M>(p, s, kv_head * l.heads + h, tile, l.at(scratch.tiles, h * s.tiles + index), l);
  }
  if (p.dq) __builtin_memset(scratch.tiles.dq, 0, l.heads * s.tiles * l.dq_size() * sizeof(S));

  const GradWanted want = {p.dq != nullptr, p.dk != nullptr, p.dv != nullptr};
  const auto c = static_cast<S>(p.scale * M::unit);
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t first = b * kBlockGroups<M>, keys = min64(kBlockGroups<M>, s.key_groups - first) * 8;
    const auto place = [&](const void* base, const int64_t (&stride)[3]) {
      return [&s, from = row<T>(base, stride, s.batch, s.first_k, kv_head), step = stride[1], place = first * 8,
              zeros = reinterpret_cast<const T*>(scratch.zeros)](int64_t i) {
        const int64_t key = key_at(s, place + i);
        return key < 0 ? zeros : from + key * step;
      };
    };
    pack_keys<M, T>(block.k, 0, keys, p.head_dim, l.steps, place(p.k, p.k_stride));
    pack_keys<M, T>(block.v, 0, keys, p.head_dim, l.steps, place(p.v, p.v_stride));
    if (want.q) pack_values<M, T>(block.k_columns, 0, keys, p.head_dim, place(p.k, p.k_stride));
    __builtin_memset(block.dk, 0, kBlockGroups<M> * 8 * l.pitch * sizeof(S));
    __builtin_memset(block.dv, 0, kBlockGroups<M> * 8 * l.pitch * sizeof(S));
    for (int64_t index = 0; index < s.tiles; ++index) {
      const int64_t* seen = scratch.seen + 2 * index;
      if (seen[0] >= first + kBlockGroups<M> || seen[1] <= first) continue;
      const int64_t count = groups_of(s, index, M::lanes, first, first + kBlockGroups<M>, scratch.groups);
      if (count == 0) continue;
      int64_t masked = 0;
      for (int64_t i = 0; i < count; ++i) masked |= scratch.groups[i] & 1, scratch.groups[i] -= 2 * first;
      const int64_t queries = masked ? (tile_of<M>(s, index, tile), tile.count) : queries_of(s, index, M::lanes);
      for (int64_t h = 0; h < l.heads; ++h) {
        const QueryTile<M> at = l.at(scratch.tiles, h * s.tiles + index);
        const auto run = [&](auto vectors) {
          grad_tile<M, decltype(vectors)::value>(at, block, tile.view, scratch.groups, count, first, queries, l.steps,
                                                 l.channel_tiles, l.pitch, c, want);
        };
        switch (ceil_div(queries, M::lanes)) {
          case 1:
            run(std::integral_constant<int, 1>());
            break;
#if defined(__AVX512F__)
          case 2:
            run(std::integral_constant<int, 2>());
            break;
          default:
            run(std::integral_constant<int, 3>());
#endif
        }
      }
    }
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t key = key_at(s, first * 8 + i), token = s.first_k + key;
      if (key < 0) continue;
      if (want.k)
        store_row(row<T>(p.dk, p.dk_stride, s.batch, token, kv_head), block.dk + i * l.pitch, p.head_dim,
                  static_cast<S>(p.scale));
      if (want.v)
        store_row(row<T>(p.dv, p.dv_stride, s.batch, token, kv_head), block.dv + i * l.pitch, p.head_dim, S{1});
    }
  }
  if (partial || !want.q) return;
  for (int64_t i = 0; i < l.heads * s.tiles; ++i)
    store_queries<T, M>(p, s, kv_head * l.heads + i / s.tiles, i % s.tiles, l.at(scratch.tiles, i).dq);
}

// Rows that no sequence has: keys behind kv_len, packed rows behind the last segment.
template <class T>
void clear_rest(const AttentionGradParams& p) {
  const auto clear = [&](void* base, const int64_t (&stride)[3], int64_t batch, int64_t from, int64_t to,
                         int64_t heads) {
    for (int64_t token = from; base && token < to; ++token) {
      for (int64_t h = 0; h < heads; ++h)
        __builtin_memset(row<T>(base, stride, batch, token, h), 0, p.head_dim * sizeof(T));
    }
  };
  for (int64_t i = 0; i < (p.cu_q ? 1 : p.batch); ++i) {
    const int64_t keys = p.cu_k ? p.cu_k[p.batch] : p.kv_len ? p.kv_len[i] : p.k_len;
    if (p.cu_q) clear(p.dq, p.dq_stride, i, p.cu_q[p.batch], p.q_len, p.heads);
    clear(p.dk, p.dk_stride, i, keys, p.k_len, p.kv_heads);
    clear(p.dv, p.dv_stride, i, keys, p.k_len, p.kv_heads);
  }
}

template <class T>
void run(const AttentionGradParams& p) {
  using M = typename MathFor<T>::type;
  using S = typename M::S;
  clear_rest<T>(p);
  Scratch<Sequence> sequences(p.batch);
  Scratch<int64_t> order(p.batch), parts(p.batch), start(p.batch);
  Scratch<double> costs(p.batch);
  GradLayout<M> l;
  l.channel_tiles = ceil_div(p.head_dim, 8), l.steps = l.channel_tiles * 8 / M::pair;
  l.pitch = ceil_div(p.head_dim, M::lanes) * M::lanes;
  l.tiles = 1, l.whole = false, l.heads = p.heads / p.kv_heads, l.dim = p.head_dim;
  double total = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence s = sequences.get()[i] = sequence_of(p, i, M::lanes);
    costs.get()[i] = s.cost;
    total += s.cost;
    l.tiles = max64(l.tiles, s.tiles);
  }
  sort_by_cost(costs.get(), order.get(), p.batch);
  int64_t count = 0, partials = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence& s = sequences.get()[i];
    // a part packs the queries anew: it holds at least two blocks of keys
    const int64_t most = max64(1, ceil_div(s.key_groups, kBlockGroups<M>) / 2);
    const double share = total > 0 ? s.cost / total : 0;
    parts.get()[i] =
        max64(1, min64(most, static_cast<int64_t>(share * kTasksWanted / static_cast<double>(p.kv_heads) + 0.999)));
    start.get()[i] = partials;
    if (parts.get()[i] > 1) partials += parts.get()[i] * p.kv_heads * l.heads * s.tiles;
    l.whole |= parts.get()[i] == 1;
    count += parts.get()[i];
  }
  Scratch<GradTask> tasks(count);
  count = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t index = order.get()[i];
    for (int64_t part = 0; part < parts.get()[index]; ++part) tasks.get()[count++] = {index, part};
  }
  Scratch<S> partial(p.dq ? partials * l.dq_size() : 0);
  const int64_t pitch = l.carve(nullptr).bytes, work = count * p.kv_heads;
  const int threads = static_cast<int>(max64(1, min64(p.threads, work)));
  Scratch<char> scratch(pitch * threads);
  // dq of (sequence, key head, part): tiles of all its query heads
  const auto partial_of = [&](int64_t sequence, int64_t kv_head, int64_t part) {
    const int64_t tiles = l.heads * sequences.get()[sequence].tiles;
    return partial.get() + (start.get()[sequence] + (kv_head * parts.get()[sequence] + part) * tiles) * l.dq_size();
  };
  parallel_tasks(work, threads, [&](int64_t i, int thread) {
    const auto [sequence, part] = tasks.get()[i / p.kv_heads];
    const int64_t kv_head = i % p.kv_heads, split = parts.get()[sequence];
    run_part<T, M>(p, sequences.get()[sequence], kv_head, part, split, scratch.get() + pitch * thread, l,
                   split > 1 && p.dq ? partial_of(sequence, kv_head, part) : nullptr);
  });
  for (int64_t sequence = 0; sequence < p.batch && p.dq; ++sequence) {
    const Sequence& s = sequences.get()[sequence];
    const int64_t split = parts.get()[sequence];
    if (split == 1) continue;
    parallel_tasks(p.heads * s.tiles, p.threads, [&](int64_t i, int) {
      const int64_t head = i / s.tiles, index = i % s.tiles;
      const int64_t at = (head % l.heads * s.tiles + index) * l.dq_size();
      S* total_of = partial_of(sequence, head / l.heads, 0) + at;
      for (int64_t part = 1; part < split; ++part) {
        const S* other = partial_of(sequence, head / l.heads, part) + at;
        for (int64_t c = 0; c < l.dq_size(); ++c) total_of[c] += other[c];
      }
      store_queries<T, M>(p, s, head, index, total_of);
    });
  }
}

}  // namespace

void attention_backward(const AttentionGradParams& p) { FASTDIT_DTYPE_SWITCH(p.dtype, T, run<T>(p)) }

}  // namespace fastdit::cpu::FASTDIT_ISA
