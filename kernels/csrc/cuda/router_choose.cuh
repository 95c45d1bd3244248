// The experts of a token's largest scores, chosen by one warp.
#pragma once

#include <cstdint>

#include "mm/device.cuh"
#include "mm/warp.cuh"

namespace mm {

inline constexpr int kMostExperts = 1024;

// A score as an integer of the same order: -0 as 0, and every NaN above all numbers, as torch's topk has it. The least
// integer is no score: it stands for one that was taken.
inline constexpr int kTaken = -0x7fffffff - 1;

__device__ __forceinline__ int order_of(float score) {
  const int word = __float_as_int(score + 0.0f);
  return (word & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : word < 0 ? word ^ 0x7fffffff : word;
}

// The `choices` <= `experts` largest, largest first; of equal ones the lower expert first. keys[e] is order_of(e's score),
// written by lane e % 32, and is used up.
__device__ __forceinline__ void choose(int* keys, int experts, int choices, int* chosen) {
  const int lane = lane_id();
  for (int k = 0; k < choices; ++k) {
    int largest = kTaken, first = experts;
    for (int e = lane; e < experts; e += kWarpSize) {
      if (keys[e] > largest) {
        largest = keys[e];
        first = e;
      }
    }
    const int top = __reduce_max_sync(kWholeWarp, largest);
    first = __reduce_min_sync(kWholeWarp, largest == top ? first : experts);
    if (first % kWarpSize == lane) keys[first] = kTaken;
    if (lane == 0) chosen[k] = first;
  }
}

// The choice of rows begin to end - 1 of scores in global memory, a warp for each. keys: `experts` for every warp.
__device__ __forceinline__ void choose_rows(const float* scores, int begin, int end, int experts, int choices, int* chosen,
                                            int* keys) {
  keys += warp_id() * experts;
  for (int token = begin + warp_id(); token < end; token += static_cast<int>(blockDim.x) / kWarpSize) {
    const float* const row = scores + std::int64_t{token} * experts;
    for (int e = lane_id(); e < experts; e += kWarpSize) keys[e] = order_of(row[e]);
    choose(keys, experts, choices, chosen + std::int64_t{token} * choices);
  }
}

}  // namespace mm
