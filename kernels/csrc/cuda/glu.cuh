// Gated linear units with the gate weight of each row folded in: bodies and launches, for CUDA and for the emulator.
//
// Both are bound by memory. How many rows count is read on the device, once for each warp, so every warp takes several
// rows in turn.
#pragma once

#include "mm/activation.h"
#include "mm/launch.h"
#include "mm/vec.cuh"
#include "mm/warp.cuh"

namespace mm {

inline constexpr int kGluThreads = 256;
inline constexpr int kGluWarps = kGluThreads / kWarpSize;

// Rows that count: the sum of `counts`, or all. The same in every lane.
struct Used {
  const std::int64_t* counts;
  int groups;  // how many counts; -1: all rows
  std::int64_t rows;

  __device__ __forceinline__ std::int64_t get() const {
    if (groups < 0) return rows;
    long long sum = 0;
    for (int group = lane_id(); group < groups; group += kWarpSize) {
      sum += counts[group];
    }
    sum = warp_sum(sum);
    return sum < rows ? sum : rows;
  }
};

template <int Bytes>
__device__ __forceinline__ void load_units(const Unit<Bytes>* row, bool wanted, int at, Unit<Bytes>& unit) {
  unit = wanted ? __ldg(row + at) : Unit<Bytes>{};
}

template <int Bytes>
struct GluJob {
  ConstUnitRows<Bytes> h1, h3;
  UnitRows<Bytes> act;
  const float* weights;  // or nullptr
  Used used;
  int units, length;
};

// A warp for each row, or for each part of a wide one (blockIdx.y).
template <Glu kind, typename T, int Bytes>
__global__ void __launch_bounds__(kGluThreads) glu_kernel(GluJob<Bytes> job) {
  constexpr int kUnits = 4;
  using Values = Numbers<T, Bytes>;
  const std::int64_t used = job.used.get(), step = std::int64_t{gridDim.x} * kGluWarps;
  const int begin = static_cast<int>(blockIdx.y) * job.length, end = min(begin + job.length, job.units);
  for (std::int64_t row = std::int64_t{blockIdx.x} * kGluWarps + warp_id(); row < job.used.rows; row += step) {
    Unit<Bytes> h1[kUnits], h3[kUnits];
    const bool counts = row < used;
    const float weight = counts && job.weights ? job.weights[row] : 1.0f;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = begin + lane_id() + i * kWarpSize;
      load_units<Bytes>(job.h1[row], counts && at < end, at, h1[i]);
      load_units<Bytes>(job.h3[row], counts && at < end, at, h3[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = begin + lane_id() + i * kWarpSize;
      const Values a(h1[i]), b(h3[i]);
      Values out;
#pragma unroll
      for (int j = 0; j < Values::kCount; ++j) {
        out.at[j] = gate<kind>(a.at[j]).value * b.at[j] * weight;
      }
      if (at < end) job.act[row][at] = out.unit();  // zeros where the row does not count
    }
  }
}

inline unsigned glu_blocks(std::int64_t wanted, int processors, int threads) {
  // Four times as many as run at once, so that the processors finish together; a warp then takes several rows.
  const std::int64_t most = std::int64_t{processors} * (2048 / threads) * 4;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <Glu kind, typename T, int Bytes>
void launch_glu(GluJob<Bytes> job, int processors, cudaStream_t stream) {
  const Parts parts = share_row(job.units, kWarpSize, 4 * kWarpSize);
  job.length = parts.length;
  const unsigned blocks = glu_blocks((job.used.rows + kGluWarps - 1) / kGluWarps, processors, kGluThreads);
  launch(glu_kernel<kind, T, Bytes>, dim3(blocks, parts.parts), dim3(kGluThreads), 0, stream, job);
}

inline constexpr int kGluBackThreads = 128;  // at most: as many as the row has use for

template <int Bytes>
struct GluBackJob {
  ConstUnitRows<Bytes> d_act, h1, h3;
  UnitRows<Bytes> d_h1, d_h3, act;
  const float* weights;  // or nullptr
  float* d_weights;
  Used used;
  int units;

  __device__ __forceinline__ void clear(std::int64_t row) const {
    for (int at = threadIdx.x; at < units; at += blockDim.x) {
      d_h1[row][at] = d_h3[row][at] = act[row][at] = Unit<Bytes>{};
    }
  }
};

// One unit of a row; returns its part of <d_act, gate(h1) * h3>.
template <Glu kind, typename T, int Bytes>
__device__ __forceinline__ float glu_back_unit(const GluBackJob<Bytes>& job, std::int64_t row, int at, float weight,
                                               const Unit<Bytes> (&unit)[3]) {
  using Values = Numbers<T, Bytes>;
  const Values d_act(unit[0]), h1(unit[1]), h3(unit[2]);
  Values d_h1, d_h3, act;
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < Values::kCount; ++j) {
    const Gate<float> g = gate<kind>(h1.at[j]);
    const float plain = g.value * h3.at[j], d = d_act.at[j] * weight;
    dot += plain * d_act.at[j];
    act.at[j] = plain * weight;
    d_h3.at[j] = d * g.value;
    d_h1.at[j] = d * h3.at[j] * g.slope;
  }
  job.d_h1[row][at] = d_h1.unit();
  job.d_h3[row][at] = d_h3.unit();
  job.act[row][at] = act.unit();
  return dot;
}

template <Glu kind, typename T, int Bytes>
__device__ __forceinline__ float glu_back_row(const GluBackJob<Bytes>& job, std::int64_t row, float weight) {
  constexpr int kUnits = 2;
  float dot = 0.0f;
  for (int tile = 0; tile < job.units; tile += kUnits * static_cast<int>(blockDim.x)) {
    Unit<Bytes> unit[kUnits][3];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = tile + static_cast<int>(threadIdx.x + i * blockDim.x);
      load_units<Bytes>(job.d_act[row], at < job.units, at, unit[i][0]);
      load_units<Bytes>(job.h1[row], at < job.units, at, unit[i][1]);
      load_units<Bytes>(job.h3[row], at < job.units, at, unit[i][2]);
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = tile + static_cast<int>(threadIdx.x + i * blockDim.x);
      if (at < job.units) dot += glu_back_unit<kind, T, Bytes>(job, row, at, weight, unit[i]);
    }
  }
  return dot;
}

// A block for each row, because the weight's gradient is a sum over it.
template <Glu kind, typename T, int Bytes>
__global__ void __launch_bounds__(kGluBackThreads) glu_back_kernel(GluBackJob<Bytes> job) {
  constexpr int kMostWarps = kGluBackThreads / kWarpSize;
  MM_SHARED(float, sums, 2 * kMostWarps);  // two sets in turn, so one barrier for each row is enough
  const std::int64_t used = job.used.get();
  float* mine = sums;
  for (std::int64_t row = blockIdx.x; row < job.used.rows; row += gridDim.x) {
    if (row >= used) {
      job.clear(row);
      if (job.weights && threadIdx.x == 0) job.d_weights[row] = 0.0f;
      continue;
    }
    const float dot = glu_back_row<kind, T, Bytes>(job, row, job.weights ? job.weights[row] : 1.0f);
    if (!job.weights) continue;
    const float part = warp_sum(dot);
    if (lane_id() == 0) mine[warp_id()] = part;
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0.0f;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
        sum += mine[warp];
      }
      job.d_weights[row] = sum;
    }
    mine = mine == sums ? sums + kMostWarps : sums;
  }
}

template <Glu kind, typename T, int Bytes>
void launch_glu_back(const GluBackJob<Bytes>& job, int processors, cudaStream_t stream) {
  const int threads = job.units <= 64 ? 32 : job.units <= 128 ? 64 : kGluBackThreads;  // two units each, if there are
  const unsigned blocks = glu_blocks(job.used.rows, processors, threads);
  launch(glu_back_kernel<kind, T, Bytes>, dim3(blocks), dim3(threads), 0, stream, job);
}

}  // namespace mm
