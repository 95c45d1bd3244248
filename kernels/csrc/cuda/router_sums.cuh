// Sums that blocks made, added up in a fixed order.
#pragma once

#include "mm/launch.h"
#include "mm/warp.cuh"

namespace mm {

// sums[i] = partial[0][i] + partial[1][i] + ... in a fixed order.
inline constexpr int kPartialGroups = 32;

template <int Groups>
__global__ void __launch_bounds__(Groups* kWarpSize)
    sum_partials(const float* partial, float* sums, std::int64_t count, int partials) {
  MM_SHARED(float, group, Groups * kWarpSize);
  const std::int64_t at = std::int64_t{blockIdx.x} * kWarpSize + lane_id();
  float sum = 0.0f;
  if (at < count) {
#pragma unroll 4
    for (int p = warp_id(); p < partials; p += Groups) sum += partial[p * count + at];
  }
  group[threadIdx.x] = sum;
  __syncthreads();
  if (warp_id() != 0 || at >= count) return;
#pragma unroll
  for (int i = 1; i < Groups; ++i) sum += group[i * kWarpSize + lane_id()];
  sums[at] = sum;
}

inline void launch_sum_partials(const float* partial, float* sums, std::int64_t count, int partials,
                                cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((count + kWarpSize - 1) / kWarpSize);
  launch(sum_partials<kPartialGroups>, blocks, kPartialGroups * kWarpSize, 0, stream, partial, sums, count, partials);
}

}  // namespace mm
