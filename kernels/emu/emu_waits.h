// What fibres call and may wait in: barriers, warp operations, shared memory.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "emu_fibres.h"

namespace mm::emu {

// Into a plain array: what a fibre holds when it is given up is never freed.
inline void Worker::fail(const char* format, ...) {
  const int used = std::snprintf(error_, sizeof error_, "thread %d: ", running_->thread);
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_ + used, sizeof error_ - used, format, values);
  va_end(values);
  release(&end_token_);
  for (;;) pause();
}

inline int Worker::barrier(int predicate, unsigned line, int which) {
  Fibre& fibre = *running_;
  fibre.wait = Wait::barrier;
  fibre.line = line;
  fibre.mask = 0;
  fibre.predicate = predicate != 0;
  char* token = &barrier_token_[fibre.barriers++ & 1];
  release(token);
  if (++at_barrier_ == threads_) pass_barrier();
  pause();
  acquire(token);
  return barrier_result_[which];
}

inline void Worker::pass_barrier() {
  int count = 0;
  for (int i = 0; i < threads_; ++i) {
    Fibre& fibre = *fibres_[i];
    if (fibre.line != fibres_[0]->line)
      fail("waits at the __syncthreads of line %u, others at that of line %u", running_->line,
           fibre.line == running_->line ? fibres_[0]->line : fibre.line);
    count += fibre.predicate;
    make_ready(fibre);
  }
  barrier_result_[0] = count;
  barrier_result_[1] = count == threads_;
  barrier_result_[2] = count > 0;
  at_barrier_ = 0;
  idle_yields_ = 0;
}

inline std::uint64_t Worker::warp_operation(unsigned mask, Combine combine, std::uint64_t value, int source) {
  Fibre& fibre = *running_;
  const int first = fibre.thread / kWarp * kWarp;
  const int present = std::min(kWarp, threads_ - first);
  if ((mask >> (fibre.thread - first) & 1u) == 0) fail("a warp operation with a mask without the calling lane");
  if (present < kWarp && (mask >> present) != 0)
    fail("a warp operation with a mask of lanes that the block has not");
  fibre.wait = Wait::warp;
  fibre.line = 0;
  fibre.combine = combine;
  fibre.mask = mask;
  fibre.value = value;
  fibre.source = source;
  bool complete = true;
  for (int lane = 0; complete && lane < present; ++lane) {
    const Fibre& other = *fibres_[first + lane];
    if ((mask >> lane & 1u) && (other.wait != Wait::warp || other.combine != combine || other.mask != mask))
      complete = false;
  }
  if (complete) complete_group(mask, combine);
  pause();
  return fibre.result;
}

inline void Worker::complete_group(unsigned mask, Combine combine) {
  const int first = running_->thread / kWarp * kWarp;
  Group group{mask, {}, {}};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    group.value[lane] = fibres_[first + lane]->value;
    group.source[lane] = fibres_[first + lane]->source;
    if (group.source[lane] >= 0 && !(mask >> group.source[lane] & 1u))
      fail("a shuffle reads lane %d, which is not in the mask 0x%08x", group.source[lane], mask);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    Fibre& fibre = *fibres_[first + lane];
    fibre.result = combine(group, lane);
    make_ready(fibre);
  }
  idle_yields_ = 0;
}

inline void Worker::warp_sync(unsigned mask) {
  Fibre& fibre = *running_;
  const int warp = fibre.thread / kWarp;
  const int present = std::min(kWarp, threads_ - warp * kWarp);
  const bool whole = mask == (present == kWarp ? ~0u : (1u << present) - 1u);
  char* token = whole ? &warp_token_[warp][fibre.warp_syncs++ & 1] : &part_token_[warp];
  release(token);
  warp_operation(mask, [](const Group&, int) { return std::uint64_t{0}; }, 0, -1);
  acquire(token);
}

inline void Worker::yield() {
  if (++idle_yields_ > 10'000'000) fail("threads have been spinning without end");
  make_ready(*running_);
  pause();
}

inline void* Worker::shared(const void* key, std::size_t bytes) {
  for (int i = 0; i < shared_count_; ++i)
    if (shared_[i].key == key) {
      acquire(shared_[i].memory);
      return shared_[i].memory;
    }
  if (shared_count_ == kMaxShared) fail("more shared arrays than the emulator holds");
  void* memory = poisoned(bytes);
  shared_[shared_count_++] = {key, memory};
  release(memory);  // it comes from one fibre's hand and belongs to all
  return memory;
}

}  // namespace mm::emu
