// Moving rows to their experts' places and summing them up again: bodies and launches, for CUDA and for the emulator.
//
// All three are bound by memory. A warp has 8 loads of 16 bytes in flight for each lane, and every row that is written is
// written by one warp (or by one for each part of a wide row): no atomics, so results repeat bit by bit.
#pragma once

#include "mm/launch.h"
#include "mm/vec.cuh"
#include "mm/warp.cuh"

namespace mm {

inline constexpr int kRowThreads = 128;
inline constexpr int kRowWarps = kRowThreads / kWarpSize;

// Where each of a token's choices lies, by lane: 32 at a time. A row beyond the end stops the kernel, as an index of
// torch's own does.
struct Places {
  const int* place;
  int choices, rows;

  __device__ __forceinline__ int of_lane(std::int64_t token, int first) const {
    const int k = first + lane_id();
    const int row = k < choices ? place[token * choices + k] : -1;
    if (row >= rows) __trap();
    return row;
  }

  __device__ __forceinline__ int count(int first) const { return min(choices - first, kWarpSize); }
};

// The part of a row that a warp works on, from blockIdx.y.
struct Span {
  int begin, end;
  __device__ __forceinline__ Span(int length, int units)
      : begin(static_cast<int>(blockIdx.y) * length), end(min(begin + length, units)) {}
};

// Rows without a source, of 32 neighbours.
__device__ __forceinline__ unsigned holes(const int* source, std::int64_t first, std::int64_t rows) {
  const std::int64_t row = first + lane_id();
  return __ballot_sync(kWholeWarp, row < rows && source[row] < 0);
}

template <int Bytes>
__device__ __forceinline__ void zero_units(Unit<Bytes>* row, int begin, int end) {
  for (int at = begin + lane_id(); at < end; at += kWarpSize) {
    row[at] = Unit<Bytes>{};
  }
}

// ---------------------------------------------------------------------------------------------------- permute_rows

// One 32-bit value beside each row, in the columns behind it.
struct Beside {
  bool wanted;
  const unsigned* values;  // by choice
  unsigned empty;
  bool in_halves;  // columns of two bytes: two of them, and no alignment to four
  char* data;      // of the first row's value
  std::int64_t stride;  // in bytes

  __device__ __forceinline__ void put(std::int64_t row, unsigned value) const {
    char* const to = data + row * stride;
    if (in_halves) {
      reinterpret_cast<unsigned short*>(to)[0] = static_cast<unsigned short>(value);
      reinterpret_cast<unsigned short*>(to)[1] = static_cast<unsigned short>(value >> 16);
    } else {
      *reinterpret_cast<unsigned*>(to) = value;
    }
  }
};

template <int Bytes>
struct PermuteJob {
  ConstUnitRows<Bytes> x;
  UnitRows<Bytes> y;
  const int* source;
  Places places;
  Beside beside;
  std::int64_t tokens, rows;
  int units, length;

  // Each token's row is read once and written to all its places.
  __device__ __forceinline__ void copy(std::int64_t token, Span span) const {
    constexpr int kUnits = 8;
    const int lane = lane_id();
    int mine = places.of_lane(token, 0);
    Unit<Bytes> unit[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = span.begin + lane + i * kWarpSize;
      if (at < span.end) unit[i] = __ldg(x[token] + at);
    }
    for (int first = 0; first < places.choices; first += kWarpSize) {
      if (first > 0) mine = places.of_lane(token, first);
      if (beside.wanted && blockIdx.y == 0 && mine >= 0) {
        beside.put(mine, beside.values[token * places.choices + first + lane]);
      }
      for (int k = 0; k < places.count(first); ++k) {
        const int row = __shfl_sync(kWholeWarp, mine, k);
        if (row < 0) continue;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          const int at = span.begin + lane + i * kWarpSize;
          if (at < span.end) y[row][at] = unit[i];
        }
      }
    }
  }

  __device__ __forceinline__ void clear(std::int64_t first, Span span) const {
    for (unsigned left = holes(source, first, rows); left; left &= left - 1) {
      const std::int64_t row = first + __ffs(static_cast<int>(left)) - 1;
      zero_units<Bytes>(y[row], span.begin, span.end);
      if (beside.wanted && blockIdx.y == 0 && lane_id() == 0) beside.put(row, beside.empty);
    }
  }
};

// Warps for the tokens first, then one for every 32 rows, for the holes among them.
template <int Bytes>
__global__ void __launch_bounds__(kRowThreads) permute_kernel(PermuteJob<Bytes> job) {
  const std::int64_t warp = std::int64_t{blockIdx.x} * kRowWarps + warp_id();
  const Span span(job.length, job.units);
  if (warp < job.tokens) {
    job.copy(warp, span);
  } else {
    job.clear((warp - job.tokens) * kWarpSize, span);
  }
}

inline unsigned blocks_for(std::int64_t warps, int warps_in_block) {
  return static_cast<unsigned>((warps + warps_in_block - 1) / warps_in_block);
}

inline std::int64_t hole_warps(std::int64_t rows) { return (rows + kWarpSize - 1) / kWarpSize; }

template <int Bytes>
void launch_permute(PermuteJob<Bytes> job, cudaStream_t stream) {
  const Parts parts = share_row(job.units, kWarpSize, 8 * kWarpSize);
  job.length = parts.length;
  const dim3 grid(blocks_for(job.tokens + hole_warps(job.rows), kRowWarps), parts.parts);
  launch(permute_kernel<Bytes>, grid, dim3(kRowThreads), 0, stream, job);
}

// -------------------------------------------------------------------------------------------------- unpermute_rows

template <typename T, int Bytes>
struct UnpermuteJob {
  ConstUnitRows<Bytes> y;
  UnitRows<Bytes> out;
  Places places;
  const float* weights;  // by choice, or nullptr
  std::int64_t tokens;
  int units, length;

  static constexpr int kUnits = 4;
  static constexpr int kTogether = 2;  // choices whose loads are in flight together
  static_assert(kWarpSize % kTogether == 0);
  using Values = Numbers<T, Bytes>;

  __device__ __forceinline__ void load(int row, Span span, Unit<Bytes> (&unit)[kUnits]) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = span.begin + lane_id() + i * kWarpSize;
      unit[i] = row >= 0 && at < span.end ? __ldg(y[row] + at) : Unit<Bytes>{};
    }
  }

  static __device__ __forceinline__ void add(const Unit<Bytes> (&unit)[kUnits], float weight, Values (&sum)[kUnits]) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Values part(unit[i]);
#pragma unroll
      for (int j = 0; j < Values::kCount; ++j) {
        sum[i].at[j] += weight * part.at[j];
      }
    }
  }

  // In the order of the choices, whatever their number.
  __device__ __forceinline__ void sum_choices(std::int64_t token, Span span) const {
    Values sum[kUnits] = {};
    for (int first = 0; first < places.choices; first += kWarpSize) {
      const int mine = places.of_lane(token, first), count = places.count(first);
      const bool weighted = weights && lane_id() < count;
      const float my_weight = weighted ? weights[token * places.choices + first + lane_id()] : 1.0f;
      for (int k = 0; k < count; k += kTogether) {
        int row[kTogether];
        Unit<Bytes> unit[kTogether][kUnits];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          row[j] = __shfl_sync(kWholeWarp, mine, k + j);  // behind the last choice: none
          load(row[j], span, unit[j]);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const float weight = __shfl_sync(kWholeWarp, my_weight, k + j);
          if (row[j] >= 0) add(unit[j], weight, sum);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = span.begin + lane_id() + i * kWarpSize;
      if (at < span.end) out[token][at] = sum[i].unit();
    }
  }
};

template <typename T, int Bytes>
__global__ void __launch_bounds__(kRowThreads) unpermute_kernel(UnpermuteJob<T, Bytes> job) {
  const std::int64_t token = std::int64_t{blockIdx.x} * kRowWarps + warp_id();
  if (token < job.tokens) job.sum_choices(token, Span(job.length, job.units));
}

template <typename T, int Bytes>
void launch_unpermute(UnpermuteJob<T, Bytes> job, cudaStream_t stream) {
  const Parts parts = share_row(job.units, kWarpSize, UnpermuteJob<T, Bytes>::kUnits * kWarpSize);
  job.length = parts.length;
  const dim3 grid(blocks_for(job.tokens, kRowWarps), parts.parts);
  launch(unpermute_kernel<T, Bytes>, grid, dim3(kRowThreads), 0, stream, job);
}

// --------------------------------------------------------------------------------------------------- unpermute_bwd

inline constexpr int kBackThreads = 128;
inline constexpr int kBackWarps = kBackThreads / kWarpSize;

template <typename T, int Bytes>
struct UnpermuteBackJob {
  ConstUnitRows<Bytes> d_out, y;
  UnitRows<Bytes> d_y;
  const int* source;
  Places places;
  const float* weights;
  float* d_weights;
  std::int64_t tokens, rows;
  int units;

  static constexpr int kUnits = 4;
  using Values = Numbers<T, Bytes>;

  // One choice and one tile of the row: d_y = weight * d_out, and this thread's part of <d_out, y>.
  __device__ __forceinline__ float scale(const Values (&d)[kUnits], int row, float weight, int tile) const {
    Unit<Bytes> unit[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = tile + threadIdx.x + i * kBackThreads;
      unit[i] = at < units ? __ldg(y[row] + at) : Unit<Bytes>{};
    }
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = tile + threadIdx.x + i * kBackThreads;
      const Values values(unit[i]);
      Values scaled;
#pragma unroll
      for (int j = 0; j < Values::kCount; ++j) {
        dot += d[i].at[j] * values.at[j];
        scaled.at[j] = weight * d[i].at[j];
      }
      if (at < units) d_y[row][at] = scaled.unit();
    }
    return dot;
  }

  // dots: [K, warps] in shared memory. A slot belongs to one warp until the barrier.
  __device__ __forceinline__ void token_tile(std::int64_t token, int tile, float* dots) const {
    Values d[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = tile + threadIdx.x + i * kBackThreads;
      d[i] = Values(at < units ? __ldg(d_out[token] + at) : Unit<Bytes>{});
    }
    for (int k = 0; k < places.choices; ++k) {
      const int row = places.place[token * places.choices + k];
      if (row >= places.rows) __trap();
      float dot = 0.0f;
      if (row >= 0) dot = warp_sum(scale(d, row, weights[token * places.choices + k], tile));
      float* const slot = dots + k * kBackWarps + warp_id();
      if (lane_id() == 0) *slot = tile == 0 ? dot : *slot + dot;
    }
  }

  __device__ __forceinline__ void whole_token(std::int64_t token, float* dots) const {
    for (int tile = 0; tile == 0 || tile < units; tile += kUnits * kBackThreads) {
      token_tile(token, tile, dots);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < places.choices; k += kBackThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kBackWarps; ++warp) {
        sum += dots[k * kBackWarps + warp];
      }
      d_weights[token * places.choices + k] = sum;
    }
  }
};

// Blocks for the tokens first, then warps for the holes as above.
template <typename T, int Bytes>
__global__ void __launch_bounds__(kBackThreads) unpermute_back_kernel(UnpermuteBackJob<T, Bytes> job) {
  MM_DYNAMIC_SHARED(float, dots);
  const std::int64_t block = blockIdx.x;
  if (block < job.tokens) {
    job.whole_token(block, dots);
    return;
  }
  const std::int64_t first = ((block - job.tokens) * kBackWarps + warp_id()) * kWarpSize;
  for (unsigned left = holes(job.source, first, job.rows); left; left &= left - 1) {
    zero_units<Bytes>(job.d_y[first + __ffs(static_cast<int>(left)) - 1], 0, job.units);
  }
}

template <typename T, int Bytes>
void launch_unpermute_back(const UnpermuteBackJob<T, Bytes>& job, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(job.tokens + blocks_for(hole_warps(job.rows), kBackWarps));
  const std::size_t shared = sizeof(float) * kBackWarps * job.places.choices;
  launch(unpermute_back_kernel<T, Bytes>, dim3(blocks), dim3(kBackThreads), shared, stream, job);
}

}  // namespace mm
