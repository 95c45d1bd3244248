// Op `plan` on a GPU: a stable counting sort by expert in two launches; a third one selects by key within limits.
//
//   count    every block counts the choices of each expert in its part
//   place    every block adds up the counts of the others, which gives its first row of each expert; inside a block
//            each warp has a part of its own and finds equal experts among its 32 choices with a match, in order
//   select   (`place` has written choices and keys sorted by expert) a block per expert finds the key of the last
//            choice that is kept, digit by digit, and gives the kept ones their rows
// Only integers are added, so every run gives the same bits. Nothing waits for the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "mm/device.cuh"
#include "mm/launch.h"
#include "mm/warp.cuh"

namespace mm {

inline constexpr int kPlanThreads = 256;
inline constexpr int kPlanWarps = kPlanThreads / kWarpSize;
inline constexpr int kPlanMaxExperts = 1024;  // of count and place: what their shared memory holds
inline constexpr int64_t kPlanMaxBlocks = 128;
inline constexpr int kSelectThreads = 512;
inline constexpr int kSelectEach = 4;  // choices of a thread in one step

template <typename Expert>
struct PlanTask {
  const Expert* experts;
  const unsigned* keys;     // nullptr: order of arrival
  const int64_t* capacity;  // nullptr: no bound
  int32_t* place;
  int32_t* source;
  int64_t* counts;
  int64_t choices, rows;  // T * K, R
  int num_experts, slots;
  bool float_keys;  // else int32
  // Work space.
  int* histogram;          // [blocks, E]
  int* ranges;             // [3, E]: first place when sorted, how many, first row. The rest is used to select only
  int* sorted;             // [choices]
  unsigned* sorted_keys;   // [choices], as unsigned numbers of the same order
  int64_t blocks, chunk;   // a block's part, a multiple of kPlanThreads

  __host__ __device__ bool selects() const { return keys != nullptr && (capacity != nullptr || slots > 0); }
};

// Sets how the work is cut, which the size of the work space depends on.
template <typename Expert>
void divide(PlanTask<Expert>& task) {
  const int64_t steps = std::max<int64_t>(1, (task.choices + kPlanThreads - 1) / kPlanThreads);
  const int64_t each = std::max<int64_t>(2, (steps + kPlanMaxBlocks - 1) / kPlanMaxBlocks);
  task.chunk = each * kPlanThreads;
  task.blocks = (steps + each - 1) / each;
}

// E for nobody.
template <typename Expert>
__device__ __forceinline__ int expert_of(const PlanTask<Expert>& task, int64_t choice) {
  const auto expert = static_cast<uint64_t>(task.experts[choice]);  // a negative one is beyond all
  return expert < static_cast<uint64_t>(task.num_experts) ? static_cast<int>(expert) : task.num_experts;
}

template <typename Expert>
__device__ __forceinline__ int limit_of(const PlanTask<Expert>& task, int expert) {
  int64_t limit = task.slots > 0 ? task.slots : task.choices;
  if (task.capacity != nullptr) limit = min(limit, max(task.capacity[expert], int64_t{0}));
  return static_cast<int>(limit);
}

// Unsigned numbers in the order of the keys: NaN the largest, -0 as 0.
template <typename Expert>
__device__ __forceinline__ unsigned ordered_key(const PlanTask<Expert>& task, int64_t choice) {
  const unsigned bits = task.keys[choice], sign = 0x80000000u;
  if (!task.float_keys) return bits ^ sign;
  if ((bits & ~sign) > 0x7f800000u) return ~0u;
  if (bits == sign) return sign;
  return bits & sign ? ~bits : bits | sign;
}

template <typename Expert>
__global__ void __launch_bounds__(kPlanThreads) plan_count(PlanTask<Expert> task) {
  MM_DYNAMIC_SHARED(int, count);
  for (int e = threadIdx.x; e < task.num_experts; e += kPlanThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * task.chunk, end = min(begin + task.chunk, task.choices);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPlanThreads) {
    const int e = expert_of(task, i);
    if (e < task.num_experts) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  int* const mine = task.histogram + static_cast<int64_t>(blockIdx.x) * task.num_experts;
  for (int e = threadIdx.x; e < task.num_experts; e += kPlanThreads) mine[e] = count[e];
}

// total[e]: choices of the expert; before[e]: those in the parts of earlier blocks.
template <typename Expert>
__device__ void add_up(const PlanTask<Expert>& task, int* total, int* before) {
  for (int e = threadIdx.x; e < task.num_experts; e += kPlanThreads) total[e] = before[e] = 0;
  __syncthreads();
  const int entries = static_cast<int>(task.blocks) * task.num_experts;
  const int mine = static_cast<int>(blockIdx.x) * task.num_experts;
  for (int i = threadIdx.x; i < entries; i += kPlanThreads) {
    const int count = task.histogram[i], e = i % task.num_experts;
    if (count == 0) continue;
    atomicAdd(&total[e], count);
    if (i < mine) atomicAdd(&before[e], count);
  }
  __syncthreads();
}

// start[e] = the sum of size(e') over e' < e, written after a barrier. Returns the sum over all.
template <typename Size>
__device__ int prefix_over_experts(int num_experts, int* start, Size size) {
  const int each = (num_experts + kPlanThreads - 1) / kPlanThreads;
  const int first = threadIdx.x * each, last = min(first + each, num_experts);
  int sum = 0, all = 0;
  for (int e = first; e < last; ++e) sum += size(e);
  int running = block_prefix<kPlanThreads>(sum, all);
  for (int e = first; e < last; ++e) {
    start[e] = running;
    running += size(e);
  }
  __syncthreads();
  return all;
}

// Marks the rows that no choice has, and what block 0 reports of each expert.
template <typename Expert>
__device__ void write_holes_and_counts(const PlanTask<Expert>& task, const int* total, const int* first_row, int used) {
  // Unsigned: rows are fewer than 2^31, and a division of 64 bits is a call.
  const unsigned step = gridDim.x * kPlanThreads, mine = blockIdx.x * kPlanThreads + threadIdx.x;
  const auto rows = static_cast<unsigned>(task.rows), slots = static_cast<unsigned>(task.slots);
  for (unsigned row = slots > 0 ? mine : mine + static_cast<unsigned>(used); row < rows; row += step) {
    if (slots > 0) {
      const int e = static_cast<int>(row / slots);
      if (static_cast<int>(row) - first_row[e] < min(total[e], limit_of(task, e))) continue;
    }
    task.source[row] = -1;
  }
  if (blockIdx.x != 0) return;
  for (int e = threadIdx.x; e < task.num_experts; e += kPlanThreads) {
    const int64_t kept = min(total[e], limit_of(task, e));
    task.counts[e] = max(int64_t{0}, min(kept, task.rows - first_row[e]));
  }
}

// next[warp * E + e] = how many choices of the expert come before the warp's part.
template <typename Expert>
__device__ void start_of_warps(const PlanTask<Expert>& task, const int* before, int* next, int64_t begin, int64_t end) {
  int* const mine = next + warp_id() * task.num_experts;
  for (int i = threadIdx.x; i < kPlanWarps * task.num_experts; i += kPlanThreads) next[i] = 0;
  __syncthreads();
  for (int64_t i = begin + lane_id(); i < end; i += kWarpSize) {
    const int e = expert_of(task, i);
    if (e < task.num_experts) atomicAdd(&mine[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < task.num_experts; e += kPlanThreads) {
    int running = before[e];
    for (int warp = 0; warp < kPlanWarps; ++warp) {
      const int count = next[warp * task.num_experts + e];
      next[warp * task.num_experts + e] = running;
      running += count;
    }
  }
  __syncthreads();
}

template <typename Expert>
__global__ void __launch_bounds__(kPlanThreads) plan_place(PlanTask<Expert> task) {
  MM_DYNAMIC_SHARED(int, shared);
  const int num_experts = task.num_experts;
  int* const total = shared;
  int* const before = total + num_experts;
  int* const first = before + num_experts;
  int* const next = first + num_experts;  // [warps, E]
  add_up(task, total, before);

  const auto kept = [&](int e) { return min(total[e], limit_of(task, e)); };
  int used = prefix_over_experts(num_experts, first, kept);
  if (task.slots > 0) {
    for (int e = threadIdx.x; e < num_experts; e += kPlanThreads) first[e] = e * task.slots;
    __syncthreads();
  }
  write_holes_and_counts(task, total, first, used);

  const bool selects = task.selects();
  if (selects) {  // from here on `first` is where an expert's choices begin when all are sorted
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < num_experts; e += kPlanThreads) {
        task.ranges[num_experts + e] = total[e];
        task.ranges[2 * num_experts + e] = first[e];
      }
    }
    prefix_over_experts(num_experts, first, [&](int e) { return total[e]; });
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < num_experts; e += kPlanThreads) task.ranges[e] = first[e];
    }
  }

  const int64_t block_end = min((blockIdx.x + 1) * task.chunk, task.choices), part = task.chunk / kPlanWarps;
  const int64_t begin = blockIdx.x * task.chunk + warp_id() * part, end = min(begin + part, block_end);
  start_of_warps(task, before, next, begin, end);
  int* const mine = next + warp_id() * num_experts;
  for (int64_t step = begin; step < end; step += kWarpSize) {
    const int64_t i = step + lane_id();
    const int e = i < end ? expert_of(task, i) : num_experts;
    const unsigned same = __match_any_sync(kWholeWarp, e);
    const int rank = e < num_experts ? mine[e] + __popc(same & lanes_below()) : 0;
    __syncwarp();
    if (e < num_experts && (same & lanes_below()) == 0) mine[e] += __popc(same);
    __syncwarp();
    if (i >= end) continue;
    if (selects && e < num_experts) {
      task.sorted[first[e] + rank] = static_cast<int>(i);
      task.sorted_keys[first[e] + rank] = ordered_key(task, i);
      continue;
    }
    const bool fits = e < num_experts && rank < limit_of(task, e) && first[e] + int64_t{rank} < task.rows;
    task.place[i] = fits ? first[e] + rank : -1;
    if (fits) task.source[first[e] + rank] = static_cast<int>(i);
  }
}

// What an expert keeps: keys above `key`, and the first `ties` of those equal to it.
struct Cut {
  unsigned key;
  int ties;
};

// One step of `find_cut`: how many of the keys that begin with `prefix` have each digit.
__device__ __forceinline__ void count_digits(const unsigned* keys, int n, unsigned prefix, int shift, int* of_digit) {
  if (threadIdx.x < 256) of_digit[threadIdx.x] = 0;
  __syncthreads();
  for (int step = warp_id() * kWarpSize; step < n; step += kSelectThreads) {
    const int i = step + lane_id();
    const unsigned key = i < n ? keys[i] : 0;
    const bool counts = i < n && (shift == 24 || key >> (shift + 8) == prefix);
    const int digit = counts ? static_cast<int>(key >> shift & 255u) : 256;
    // Keys have few first digits: without the match most of a warp would add to one address.
    const unsigned same = __match_any_sync(kWholeWarp, digit);
    if (counts && (same & lanes_below()) == 0) atomicAdd(&of_digit[digit], __popc(same));
  }
  __syncthreads();
}

// The `keep` largest of n keys, 0 < keep < n: digit by digit from the highest.
__device__ __forceinline__ Cut find_cut(const unsigned* keys, int n, int keep) {
  MM_SHARED(int, of_digit, 256);
  MM_SHARED(int, chosen, 2);
  unsigned prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    count_digits(keys, n, prefix, shift, of_digit);
    const int digit = 255 - static_cast<int>(threadIdx.x), count = digit >= 0 ? of_digit[digit] : 0;
    int all = 0;
    const int above = block_prefix<kSelectThreads>(count, all);
    if (above < keep && keep <= above + count) {  // true for one thread
      chosen[0] = digit;
      chosen[1] = keep - above;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<unsigned>(chosen[0]);
    keep = chosen[1];
  }
  return {prefix, keep};
}

template <typename Expert>
__global__ void __launch_bounds__(kSelectThreads) plan_select(PlanTask<Expert> task) {
  const int e = blockIdx.x;
  const int begin = task.ranges[e], n = task.ranges[task.num_experts + e], limit = limit_of(task, e);
  const int64_t first_row = task.ranges[2 * task.num_experts + e];
  const unsigned* const keys = task.sorted_keys + begin;
  const Cut cut = n <= limit ? Cut{0u, n} : limit == 0 ? Cut{~0u, 0} : find_cut(keys, n, limit);
  int above_before = 0, ties_before = 0;
  for (int step = 0; step < n; step += kSelectThreads * kSelectEach) {
    const int mine = step + static_cast<int>(threadIdx.x) * kSelectEach, last = min(mine + kSelectEach, n);
    int found = 0, all = 0;  // those above in the low half, ties in the high one
    for (int i = mine; i < last; ++i) found += keys[i] > cut.key ? 1 : keys[i] == cut.key ? 0x10000 : 0;
    const int before = block_prefix<kSelectThreads>(found, all);
    int above = above_before + (before & 0xffff), ties = ties_before + (before >> 16);
    for (int i = mine; i < last; ++i) {
      const bool is_above = keys[i] > cut.key, is_tie = keys[i] == cut.key;
      const int64_t row = first_row + above + min(ties, cut.ties);
      const bool kept = (is_above || (is_tie && ties < cut.ties)) && row < task.rows;
      const int choice = task.sorted[begin + i];
      task.place[choice] = kept ? static_cast<int>(row) : -1;
      if (kept) task.source[row] = choice;
      above += is_above;
      ties += is_tie;
    }
    above_before += all & 0xffff;
    ties_before += all >> 16;
  }
}

// `task` is complete, work space included.
template <typename Expert>
void run_plan(const PlanTask<Expert>& task, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(task.blocks);
  const size_t ints = static_cast<size_t>(task.num_experts) * sizeof(int);
  launch(plan_count<Expert>, blocks, kPlanThreads, ints, stream, task);
  launch(plan_place<Expert>, blocks, kPlanThreads, (3 + kPlanWarps) * ints, stream, task);
  if (!task.selects()) return;
  launch(plan_select<Expert>, static_cast<unsigned>(task.num_experts), kSelectThreads, 0, stream, task);
}

}  // namespace mm
