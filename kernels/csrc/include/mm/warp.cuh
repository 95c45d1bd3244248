// Sums and prefixes over a warp and over a block. Every thread that is meant has to call.
#pragma once

#include "mm/device.cuh"

namespace mm {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// Index of the thread in its warp; blocks here are one-dimensional.
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The lanes before this one.
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

// The sum over groups of `Width` neighbouring lanes, the same bits in each lane: a butterfly adds the same two numbers
// on both sides, in a fixed order.
template <int Width = kWarpSize, typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = Width / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

template <int Width = kWarpSize, typename T>
__device__ __forceinline__ T warp_max(T value) {
  for (int distance = Width / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// The sum of this lane's value and of those before it.
template <typename T>
__device__ __forceinline__ T warp_prefix(T value) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(kWholeWarp, value, distance);
    if (lane_id() >= distance) value += before;
  }
  return value;
}

// The sum over the threads before this one in a block of `Threads` (a multiple of 32), and in `total` that over all.
template <int Threads, typename T>
__device__ __forceinline__ T block_prefix(T value, T& total) {
  static_assert(Threads % kWarpSize == 0 && Threads <= kWarpSize * kWarpSize);
  constexpr int kWarps = Threads / kWarpSize;
  MM_SHARED(T, sums, kWarps);
  const T with_own = warp_prefix(value);
  if (lane_id() == kWarpSize - 1) sums[warp_id()] = with_own;
  __syncthreads();
  T before = with_own - value;
  total = T{};
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == warp_id()) before += total;
    total += sums[warp];
  }
  __syncthreads();  // sums may be written again
  return before;
}

// The sum over all threads of a block of `Threads`, in a fixed order, the same bits in each thread.
template <int Threads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  static_assert(Threads % kWarpSize == 0 && Threads <= kWarpSize * kWarpSize);
  constexpr int kWarps = Threads / kWarpSize;
  MM_SHARED(T, sums, kWarps);
  value = warp_sum(value);
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  T total{};
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
  __syncthreads();
  return total;
}

}  // namespace mm
