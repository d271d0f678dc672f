#include "counters.h"

#include "async.h"
#include "memory.h"

namespace fastdit::simt {

Counters& counters() {
  static Counters one;
  return one;
}

void Counters::begin_launch() { releases_.clear(), newest_.clear(); }
void Counters::begin_block() { waiters_.clear(), asleep_.clear(); }

size_t Counters::acquired(const Thread& t, const Waiter& w) const {
  size_t count = w.acquired.size();
  while (count && t.index != w.thread && !machine().known(t, w.agent, static_cast<uint32_t>(count))) --count;
  return count;
}

void Counters::raise(int* counter) {
  Machine& m = machine();
  memory().access(counter, sizeof(int), Access::atomic);
  Release r{m.block_serial, {}, {}};
  for (const Waiter& w : waiters_) {
    const size_t count = acquired(m.self(), w);
    r.before.insert(r.before.end(), w.acquired.begin(), w.acquired.begin() + static_cast<ptrdiff_t>(count));
  }
  if (const auto found = newest_.find(counter); found != newest_.end()) r.before.push_back(found->second);
  m.release(m.self(), r.knows);
  newest_[counter] = static_cast<int>(releases_.size());
  releases_.push_back(std::move(r));
  int value;
  raw_copy(&value, counter, sizeof value);
  ++value;
  raw_copy(counter, &value, sizeof value);
  for (const auto& [at, thread] : asleep_)
    if (at == counter) m.wake(thread);
}

void Counters::wait(const int* counter, int value, Site site) {
  Machine& m = machine();
  Thread& t = m.self();
  memory().access(counter, sizeof(int), Access::atomic);
  m.yield_randomly();
  for (;;) {
    int now;
    raw_copy(&now, counter, sizeof now);
    if (now == value) break;
    t.waits_for =
        " for a counter of another block to be " + std::to_string(value) + ", which is " + std::to_string(now);
    asleep_.emplace_back(counter, t.index);
    m.wait(site);
  }
  t.waits_for.clear();
  Waiter* waiter = nullptr;
  for (Waiter& w : waiters_)
    if (w.thread == t.index) waiter = &w;
  if (!waiter) waiter = &waiters_.emplace_back(Waiter{t.index, m.add_agent("waits of thread", t.index), {}});
  m.async->must_fence(t);
  const auto found = newest_.find(counter);
  if (found == newest_.end()) return;  // as the host left it
  waiter->acquired.push_back(found->second);
  m.learn(t, waiter->agent, static_cast<uint32_t>(waiter->acquired.size()));
}

bool Counters::known(const Thread& t, uint32_t block, int agent, uint32_t clock) const {
  std::vector<int> open;
  for (const Waiter& w : waiters_)
    for (size_t i = acquired(t, w); i-- > 0;) {
      if (releases_[w.acquired[i]].covers(block, agent, clock)) return true;
      open.push_back(w.acquired[i]);
    }
  std::vector<bool> seen(releases_.size(), false);  // and what those follow
  while (!open.empty()) {
    const int i = open.back();
    open.pop_back();
    if (seen[i]) continue;
    seen[i] = true;
    if (releases_[i].covers(block, agent, clock)) return true;
    open.insert(open.end(), releases_[i].before.begin(), releases_[i].before.end());
  }
  return false;
}

}  // namespace fastdit::simt
