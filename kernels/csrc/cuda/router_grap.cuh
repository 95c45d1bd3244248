// GrAP affinities and their gradients: bodies and launches, for CUDA and for the emulator.
//
// Both directions are bound by memory and read x once. A thread keeps the same features for every token that its block works
// on, with their weights and means in registers, so that nothing but x is read in the loop. Sums are made in an order that
// only the sizes and the number of multiprocessors decide.
#pragma once

#include <algorithm>

#include "mm/launch.h"
#include "mm/vec.cuh"
#include "mm/warp.cuh"
#include "router_choose.cuh"
#include "router_sums.cuh"

namespace mm {

inline constexpr int kGrapThreads = 512;

// Contiguous slices of the features, or of units or other parts of them: the first `longer` one longer than `small`.
struct SliceSizes {
  int small, longer;
  __host__ __device__ __forceinline__ int begin(int slice) const { return slice * small + min(slice, longer); }
  __host__ __device__ __forceinline__ int length(int slice) const { return small + (slice < longer); }
  // The slice of a feature, which has to exist: slices may be empty.
  __host__ __device__ __forceinline__ int of(int at) const {
    const int in_longer = longer * (small + 1);
    return at < in_longer ? at / (small + 1) : longer + (at - in_longer) / small;
  }
};

// Blocks of `threads` that a GPU works on at once, `each` of the largest size on a multiprocessor; no more than there is work.
inline int grap_blocks(std::int64_t work, int threads, int each, int multiprocessors) {
  return static_cast<int>(std::min(work, std::int64_t{multiprocessors} * each * kGrapThreads / threads));
}

inline int grap_threads(int units) {
  return std::min(kGrapThreads, std::max(1, (units + kWarpSize - 1) / kWarpSize) * kWarpSize);
}

// ---------------------------------------------------------------------------------------------------- forward

// A thread holds Units units of 16 bytes of each row, kGrapThreads apart; smaller units it does not hold, but reads them
// where they are used.
template <typename X, int Bytes, int Units>
struct GrapForwardJob {
  static constexpr int kCount = Numbers<X, Bytes>::kCount;
  static constexpr bool kHeld = Bytes == 16;
  static constexpr int kTokens = kHeld ? std::max(1, 4 / Units) : 1;  // at least 4 loads in flight, of 4 registers each
  static constexpr int kBlocks = Units == 1 ? 2 : 1;  // of the largest size, with 64 or 128 registers for each thread

  ConstUnitRows<Bytes> x;
  const float *unit, *mean;
  float *affinity, *inverse;
  int* chosen;
  int tokens, units, experts, choices;
  // Parts of a row's products that are summed up for a slice: one for each unit where no slice ends inside of one
  // (`whole`), else one for each feature. `pad`: between slices, against conflicts of shared memory's banks.
  bool whole;
  SliceSizes parts;
  int pad, lanes;  // lanes that sum up a slice

  // What a thread keeps: loads on their way, and what belongs to its features.
  struct Held {
    Unit<Bytes> row[kTokens][Units];
    float weight[Units][kCount], centre[Units][kCount];
    int padding[Units];  // before the unit's part
  };

  static __device__ __forceinline__ int at(int i) { return static_cast<int>(threadIdx.x) + i * kGrapThreads; }

  __host__ __device__ __forceinline__ int parts_of_row() const { return parts.begin(experts) + pad * experts; }
  size_t shared_bytes() const { return sizeof(float) * kTokens * (parts_of_row() + 2 * experts + 2 * kWarpSize); }

  __device__ __forceinline__ void keep(Held& held) const {
#pragma unroll
    for (int i = 0; i < Units; ++i) {
      const bool mine = at(i) < units;
      held.padding[i] = whole && mine ? pad * parts.of(at(i)) : 0;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        held.weight[i][j] = mine ? unit[at(i) * kCount + j] : 0.0f;
        held.centre[i][j] = mine ? mean[at(i) * kCount + j] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void load(Held& held, int first) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < Units; ++i) {
        if (first + t < tokens && at(i) < units) held.row[t][i] = __ldg(x[first + t] + at(i));
      }
    }
  }

  // Products of a held row, of which unit 0 goes to part[0]; returns the sum of its squares.
  __device__ __forceinline__ float multiply(const Held& held, const Unit<Bytes> (&row)[Units], float* part) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Units; ++i) {
      if (at(i) >= units) continue;
      const Numbers<X, Bytes> numbers(row[i]);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float centred = numbers.at[j] - held.centre[i][j];
        squares += centred * centred;
        if (!whole) part[at(i) * kCount + j] = centred * held.weight[i][j];
        sum += centred * held.weight[i][j];
      }
      if (whole) part[at(i) + held.padding[i]] = sum;
    }
    return squares;
  }

  // The same for a row that is not held.
  __device__ __forceinline__ float multiply(int token, float* part) const {
    const X* const row = reinterpret_cast<const X*>(x[token]);
    float squares = 0.0f;
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x); d < units * kCount; d += static_cast<int>(blockDim.x)) {
      const float centred = widened(row[d]) - mean[d];
      squares += centred * centred;
      part[d] = centred * unit[d];
    }
    return squares;
  }

  // Sums of the parts of every slice of kTokens rows, `lanes` threads for each.
  __device__ __forceinline__ void sum_slices(const float* part, float* sums) const {
    const int lane = static_cast<int>(threadIdx.x) % lanes, all = kTokens * experts;
    const int together = static_cast<int>(blockDim.x) / lanes;
    for (int first = 0; first < all; first += together) {  // every lane of a warp takes part in its shuffles
      const int which = first + static_cast<int>(threadIdx.x) / lanes;
      const int row = which / experts, expert = which % experts;
      float sum = 0.0f;
      if (which < all) {
        const float* const slice = part + row * parts_of_row() + parts.begin(expert) + pad * expert;
#pragma unroll 2
        for (int i = lane; i < parts.length(expert); i += lanes) sum += slice[i];
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kWholeWarp, sum, distance);
      }
      if (which < all && lane == 0) sums[which] = sum;
    }
  }

  // A warp's part of the end: length, cosines and choice of one token.
  __device__ __forceinline__ void finish(int token, const float* square, const float* sums, int* keys) const {
    const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / kWarpSize;
    const float length = warp_sum(lane < warps ? square[lane] : 0.0f);
    const float factor = length == 0.0f ? 0.0f : 1.0f / sqrtf(length);
#pragma unroll 1
    for (int e = lane; e < experts; e += kWarpSize) {
      const float cosine = sums[e] * factor;
      affinity[std::int64_t{token} * experts + e] = cosine;
      keys[e] = order_of(cosine);
    }
    if (lane == 0) inverse[token] = factor;
    choose(keys, experts, choices, chosen + std::int64_t{token} * choices);
  }

  __device__ __forceinline__ void run() const {
    MM_DYNAMIC_SHARED(float, part);
    float* const sums = part + kTokens * parts_of_row();
    float* const square = sums + kTokens * experts;  // two of them in turn: the last warps may still read one
    int* const keys = reinterpret_cast<int*>(square + 2 * kTokens * kWarpSize);
    const int step = static_cast<int>(gridDim.x) * kTokens;
    int first = static_cast<int>(blockIdx.x) * kTokens;
    Held held;
    if constexpr (kHeld) {
      keep(held);
      load(held, first);
    }
    for (int turn = 0; first < tokens; first += step, turn ^= 1) {
      float* const squares = square + turn * kTokens * kWarpSize;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float mine = 0.0f;
        if constexpr (kHeld) {
          mine = multiply(held, held.row[t], part + t * parts_of_row());
        } else if (first + t < tokens) {
          mine = multiply(first + t, part + t * parts_of_row());
        }
        mine = warp_sum(mine);
        if (lane_id() == 0) squares[t * kWarpSize + warp_id()] = mine;
      }
      if constexpr (kHeld) load(held, first + step);  // on its way while the sums are made
      __syncthreads();
      sum_slices(part, sums);
      __syncthreads();
      for (int t = warp_id(); t < kTokens && first + t < tokens; t += static_cast<int>(blockDim.x) / kWarpSize) {
        finish(first + t, squares + t * kWarpSize, sums + t * experts, keys + t * experts);
      }
    }
  }
};

template <typename X, int Bytes, int Units>
__global__ void __launch_bounds__(kGrapThreads, (GrapForwardJob<X, Bytes, Units>::kBlocks))
    grap_forward(GrapForwardJob<X, Bytes, Units> job) {
  job.run();
}

// Sets what follows from the sizes, and starts the kernel.
template <typename X, int Bytes, int Units>
void launch_grap_forward(GrapForwardJob<X, Bytes, Units> job, int width, int multiprocessors, cudaStream_t stream) {
  job.units = width / job.kCount;
  job.whole = job.kHeld && width > 0 && width % job.experts == 0 && width / job.experts % job.kCount == 0;
  const int parts = job.whole ? job.units : width;
  job.parts = {parts / job.experts, parts % job.experts};
  job.pad = job.whole && job.parts.small % 2 == 0;
  const int threads = grap_threads(job.units);
  job.lanes = 1;
  while (job.lanes < kWarpSize && 2 * job.lanes * job.kTokens * job.experts <= threads && job.lanes < job.parts.small) {
    job.lanes *= 2;
  }
  const int blocks = grap_blocks((job.tokens + job.kTokens - 1) / job.kTokens, threads, job.kBlocks, multiprocessors);
  launch(grap_forward<X, Bytes, Units>, blocks, threads, job.shared_bytes(), stream, job);
}

// ---------------------------------------------------------------------------------------------------- backward

// With u = (x - mean) * inverse and the gradient g of the affinity a:
//   dx = inverse * (sum_e g_e w_e - u sum_e g_e a_e),   d unit = sum_t g_te u_t on the slice of e.
// A thread holds one unit. blockIdx.y: which kGrapThreads of them.
template <typename X, int Bytes>
struct GrapBackwardJob {
  static constexpr int kTokens = 8, kInFlight = 2, kBlocks = 2;
  static constexpr int kCount = Numbers<X, Bytes>::kCount;

  const float* grad;
  std::int64_t grad_stride;
  ConstUnitRows<Bytes> x;
  UnitRows<Bytes> dx;
  const float *unit, *mean, *affinity, *inverse;
  float* partial;  // [blocks, width]: each block's sum for d unit
  std::int64_t tokens;
  int units, experts;
  SliceSizes slices;  // of features

  size_t shared_bytes() const { return sizeof(float) * 2 * kTokens * (experts + 1); }

  // For every token g_e * inverse, and by how much x - mean is shortened.
  __device__ __forceinline__ void prepare(std::int64_t first, float* factor, float* along) const {
    for (int i = warp_id(); i < kTokens && first + i < tokens; i += static_cast<int>(blockDim.x) / kWarpSize) {
      const std::int64_t token = first + i;
      const float scale = inverse[token];
      float dot = 0.0f;
#pragma unroll 1
      for (int e = lane_id(); e < experts; e += kWarpSize) {
        const float g = grad[token * grad_stride + e];
        factor[i * experts + e] = g * scale;
        dot += g * affinity[token * experts + e];
      }
      dot = warp_sum(dot);
      if (lane_id() == 0) along[i] = dot * scale * scale;
    }
  }

  // One token's dx, and its part of d unit. `expert` is that of the first feature, `left` how many features of its slice
  // there are from there on.
  template <bool Whole>
  __device__ __forceinline__ void one(std::int64_t token, int at, const Unit<Bytes>& row, const float* factor, int expert,
                                      int left, float along, const float (&weight)[kCount], const float (&centre)[kCount],
                                      float (&sum)[kCount]) const {
    Numbers<X, Bytes> numbers(row);
    float mine = factor[expert];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!Whole && j >= left) {
        left += slices.length(++expert);  // at least one, or there is no feature left
        mine = factor[expert];
      }
      const float centred = numbers.at[j] - centre[j];
      sum[j] += mine * centred;
      numbers.at[j] = mine * weight[j] - along * centred;
    }
    dx[token][at] = numbers.unit();
  }

  template <bool Whole>
  __device__ __forceinline__ void run() const {
    MM_DYNAMIC_SHARED(float, shared);
    const int at = static_cast<int>(blockIdx.y * kGrapThreads + threadIdx.x);
    const bool mine = at < units;
    const int expert = mine ? slices.of(at * kCount) : 0;
    float weight[kCount], centre[kCount], sum[kCount] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      weight[j] = mine ? unit[at * kCount + j] : 0.0f;
      centre[j] = mine ? mean[at * kCount + j] : 0.0f;
    }
    const std::int64_t step = std::int64_t{gridDim.x} * kTokens;
    int turn = 0;
    for (std::int64_t first = std::int64_t{blockIdx.x} * kTokens; first < tokens; first += step, turn ^= 1) {
      // Two buffers in turn, so one barrier is enough: whoever writes one has waited until all had read it.
      float* const factor = shared + turn * kTokens * (experts + 1);
      float* const along = factor + kTokens * experts;
      prepare(first, factor, along);
      __syncthreads();
      const int count = static_cast<int>(min(tokens - first, std::int64_t{kTokens}));
#pragma unroll 1
      for (int i = 0; mine && i < count; i += kInFlight) {
        Unit<Bytes> row[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          if (i + n < count) row[n] = __ldg(x[first + i + n] + at);
        }
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          if (i + n < count) {
            one<Whole>(first + i + n, at, row[n], factor + (i + n) * experts, expert,
                       slices.begin(expert + 1) - at * kCount, along[i + n], weight, centre, sum);
          }
        }
      }
    }
    if (!mine) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      partial[(std::int64_t{blockIdx.x} * units + at) * kCount + j] = sum[j];
    }
  }
};

// Whole: no slice ends inside of a unit.
template <typename X, int Bytes, bool Whole>
__global__ void __launch_bounds__(kGrapThreads, (GrapBackwardJob<X, Bytes>::kBlocks))
    grap_backward(GrapBackwardJob<X, Bytes> job) {
  job.template run<Whole>();
}

// How many rows `partial` needs.
template <typename X, int Bytes>
int grap_partials(std::int64_t tokens, int width, int multiprocessors) {
  using Job = GrapBackwardJob<X, Bytes>;
  const int threads = grap_threads(width / Job::kCount);
  return grap_blocks((tokens + Job::kTokens - 1) / Job::kTokens, threads, Job::kBlocks, multiprocessors);
}

template <typename X, int Bytes>
void launch_grap_backward(GrapBackwardJob<X, Bytes> job, float* d_unit, int width, int multiprocessors,
                          cudaStream_t stream) {
  job.units = width / job.kCount;
  job.slices = {width / job.experts, width % job.experts};
  const bool whole = job.slices.longer == 0 && job.slices.small % job.kCount == 0;
  const int threads = grap_threads(job.units);
  const auto blocks = static_cast<unsigned>(grap_partials<X, Bytes>(job.tokens, width, multiprocessors));
  const dim3 grid(blocks, static_cast<unsigned>((job.units + kGrapThreads - 1) / kGrapThreads));
  const auto kernel = whole ? grap_backward<X, Bytes, true> : grap_backward<X, Bytes, false>;
  launch(kernel, grid, threads, job.shared_bytes(), stream, job);
  launch_sum_partials(job.partial, d_unit, width, static_cast<int>(blocks), stream);
}

}  // namespace mm
