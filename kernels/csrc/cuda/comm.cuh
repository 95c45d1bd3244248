// One-sided exchange of rows on a node: bodies and launches, for CUDA and for the emulator.
//
//   there   exchange_counts   tells every peer how many rows come for each of its experts
//           wait_counts       has heard it of all, so that everyone knows every row's final place
//           push              writes rows to these places in the peers' memory, a flag for each tile
//           take              waits tile by tile and copies to memory of its own, so that the window is free again
//   home    publish           writes the experts' rows into this rank's own window, the flags at the peers
//           pull              waits for all flags, reads the K rows of a token at the peers and adds them up
//   finish  after take and pull: counts what has been waited for, and tells the peers that their rows have been read
//
// Exchanges, of both kinds, are numbered from 1. Before exchange n a rank waits until all have finished n - 2, whose
// buffers it uses. So none of these waits for what comes later on the same stream, and nothing waits for the host.
#pragma once

#include "mm/comm_flags.h"
#include "mm/launch.h"
#include "mm/vec.cuh"
#include "mm/warp.cuh"

namespace mm {

inline constexpr int kCommThreads = 128;
inline constexpr int kCommWarps = kCommThreads / kWarpSize;
static_assert(kMaxPeers <= kCommThreads);

// What all of them work on.
struct Exchange {
  Window window;
  Patience patience;
  unsigned number;
  const int* counts;  // [P, E]: rows of each rank for each expert
  const int* first;   // [P, E]: where they begin at the expert's rank
  unsigned* seen;     // [2, P, L, tiles]: what has been waited for, of each flag

  __device__ __forceinline__ int buffer() const { return static_cast<int>(number & 1u); }
  __device__ __forceinline__ int own(int local) const { return window.me * window.experts + local; }

  // Of rank `from`, for this rank's expert; or with `home` of this rank, for the expert of rank `from`.
  __device__ __forceinline__ int count(bool home, int from, int local) const {
    const int expert = (home ? from : window.me) * window.experts + local;
    return counts[(home ? window.me : from) * window.all_experts() + expert];
  }

  // Does rank `from` raise all that this rank expects of it in a tile of [L, tiles]?
  __device__ __forceinline__ bool wait_for_tile(bool home, int from, int tile) const {
    const int local = tile / window.tiles(), part = tile % window.tiles();
    const int rows = rows_of_tile(count(home, from, local), part);
    if (rows == 0) return true;
    const std::int64_t index =
        (std::int64_t{buffer()} * window.ranks + from) * window.experts * window.tiles() + tile;
    const int expert = (home ? from : window.me) * window.experts + local;
    const Where where{home ? Awaited::results : Awaited::rows, from, expert, part * kTileRows,
                      static_cast<int>(number)};
    return wait_until(window.flag(window.me, buffer(), from, tile), seen[index] + rows, patience, where);
  }

  // May this exchange's buffers be written, here and at the peers? Every thread of the block calls, and all get the same.
  __device__ __forceinline__ bool free_to_write() const {
    const int peer = static_cast<int>(threadIdx.x);
    bool free = true;
    if (peer < window.ranks) {
      const Where where{Awaited::done, peer, -1, 0, static_cast<int>(number)};
      free = wait_until(window.done(window.me, peer), number - 2, patience, where);
    }
    return __syncthreads_and(free) != 0;
  }
};

// Rows of one tensor, each with a value beside it if there are any.
template <int Bytes>
struct RowsBeside {
  UnitRows<Bytes> rows;
  int units;
  unsigned* values;  // nullptr: none
};

// A warp copies a row, and its first lane the value.
template <int Bytes>
__device__ __forceinline__ void copy_row(const Unit<Bytes>* from, Unit<Bytes>* to, int units) {
  constexpr int kUnits = 8;
  for (int begin = lane_id(); begin < units; begin += kUnits * kWarpSize) {
    Unit<Bytes> unit[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = begin + i * kWarpSize;
      if (at < units) unit[i] = from[at];
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = begin + i * kWarpSize;
      if (at < units) to[at] = unit[i];
    }
  }
}

template <int Bytes>
__device__ __forceinline__ void fill_row(Unit<Bytes>* to, int units, unsigned char byte) {
  Unit<Bytes> unit;
  memset(&unit, byte, sizeof unit);
  for (int at = lane_id(); at < units; at += kWarpSize) to[at] = unit;
}

template <int Bytes>
__device__ __forceinline__ Unit<Bytes>* units_at(char* row) {
  return reinterpret_cast<Unit<Bytes>*>(row);
}

__device__ __forceinline__ unsigned& value_at(char* value) { return *reinterpret_cast<unsigned*>(value); }

// ------------------------------------------------------------------------------------------------- counts, a block a peer

template <typename Count>
__global__ void __launch_bounds__(kCommThreads) exchange_counts_kernel(Exchange task, const Count* mine) {
  const Window& window = task.window;
  const int peer = blockIdx.x;
  if (!task.free_to_write()) return;
  int* const there = window.counts(peer, task.buffer(), window.me);
  for (int e = threadIdx.x; e < window.all_experts(); e += kCommThreads) {
    if (mine[e] < 0 || mine[e] > window.capacity) __trap();  // its rows would have no place
    there[e] = static_cast<int>(mine[e]);
  }
  __syncthreads();
  if (threadIdx.x == 0) release_store(window.arrived(peer, window.me), task.number);
}

static __global__ void __launch_bounds__(kCommThreads) wait_counts_kernel(Exchange task, int* all) {
  const Window& window = task.window;
  const int peer = blockIdx.x;
  bool there = true;
  if (threadIdx.x == 0) {
    const Where where{Awaited::counts, peer, -1, 0, static_cast<int>(task.number)};
    there = wait_until(window.arrived(window.me, peer), task.number, task.patience, where);
  }
  there = __syncthreads_and(there) != 0;
  const int* const here = window.counts(window.me, task.buffer(), peer);
  for (int e = threadIdx.x; e < window.all_experts(); e += kCommThreads) {
    all[peer * window.all_experts() + e] = there ? here[e] : 0;
  }
}

// ------------------------------------------------------------------------------------------------------------- the way there

template <int Bytes>
struct PushJob {
  Exchange task;
  ConstUnitRows<Bytes> x;
  int units;
  const unsigned* values;  // by choice; nullptr: none
  const int* source;       // the choice of each assignment, by expert
  const int* start;        // [E]: first assignment of each expert
  int choices;

  __device__ __forceinline__ void tile(int expert, int part) const {
    const Window& window = task.window;
    const int owner = expert / window.experts, mine = window.me * window.all_experts() + expert;
    const int rows = rows_of_tile(task.counts[mine], part), begin = part * kTileRows;
    if (rows == 0) return;
    for (int r = warp_id(); r < rows; r += kCommWarps) {
      const int choice = source[start[expert] + begin + r], row = task.first[mine] + begin + r;
      if (choice < 0) __trap();
      copy_row<Bytes>(x[choice / choices], units_at<Bytes>(window.row(owner, task.buffer(), row)), units);
      if (values && lane_id() == 0) value_at(window.value(owner, task.buffer(), row)) = values[choice];
    }
    __syncthreads();
    const int flag = expert % window.experts * window.tiles() + part;
    if (threadIdx.x == 0) release_add(window.flag(owner, task.buffer(), window.me, flag), rows);
  }
};

template <int Bytes>
__global__ void __launch_bounds__(kCommThreads) push_kernel(PushJob<Bytes> job) {
  if (!job.task.free_to_write()) return;
  const int tiles = job.task.window.tiles();
  // Each rank begins with another expert, so that not all write to the same peer at first.
  const int all = job.task.window.all_tiles(), shift = job.task.own(0) * tiles;
  for (int i = blockIdx.x; i < all; i += gridDim.x) {
    const int item = (i + shift) % all;
    job.tile(item / tiles, item % tiles);
  }
}

template <int Bytes>
struct TakeJob {
  Exchange task;
  RowsBeside<Bytes> to;
  int rows;  // R of `to`; what no rank sent is zero

  __device__ __forceinline__ void tile(int from, int index) const {
    const Window& window = task.window;
    const int local = index / window.tiles(), part = index % window.tiles();
    const int rows = rows_of_tile(task.count(false, from, local), part);
    if (rows == 0) return;
    bool there = threadIdx.x != 0 || task.wait_for_tile(false, from, index);
    there = __syncthreads_and(there) != 0;
    const int begin = task.first[from * window.all_experts() + task.own(local)] + part * kTileRows;
    for (int row = begin + warp_id(); row < begin + rows; row += kCommWarps) {
      if (!there) {  // NaN in every dtype: nobody shall take it for a result
        fill_row<Bytes>(to.rows[row], to.units, 0xff);
      } else {
        copy_row<Bytes>(units_at<Bytes>(window.row(window.me, task.buffer(), row)), to.rows[row], to.units);
      }
      if (to.values && lane_id() == 0) {
        to.values[row] = there ? value_at(window.value(window.me, task.buffer(), row)) : ~0u;
      }
    }
  }

  __device__ __forceinline__ void clear(int begin) const {
    for (int row = begin + warp_id(); row < min(begin + kTileRows, rows); row += kCommWarps) {
      fill_row<Bytes>(to.rows[row], to.units, 0);
      if (to.values && lane_id() == 0) to.values[row] = 0;
    }
  }

  // Rows that arrive here in this exchange.
  __device__ __forceinline__ int arriving() const {
    const Window& window = task.window;
    const int last = (window.ranks - 1) * window.all_experts() + task.own(window.experts - 1);
    return task.first[last] + task.counts[last];
  }
};

template <int Bytes>
__global__ void __launch_bounds__(kCommThreads) take_kernel(TakeJob<Bytes> job) {
  const Window& window = job.task.window;
  const int arriving = job.arriving(), per_rank = window.experts * window.tiles();
  for (int begin = arriving + blockIdx.x * kTileRows; begin < job.rows; begin += gridDim.x * kTileRows) {
    job.clear(begin);
  }
  for (int item = blockIdx.x; item < window.all_tiles(); item += gridDim.x) {
    job.tile(item / per_rank, item % per_rank);
  }
}

// --------------------------------------------------------------------------------------------------------------- the way home

template <int Bytes>
struct PublishJob {
  Exchange task;
  ConstUnitRows<Bytes> y;
  int units;
  const unsigned* values;  // by row; nullptr: none

  __device__ __forceinline__ void tile(int to, int index) const {
    const Window& window = task.window;
    const int local = index / window.tiles(), part = index % window.tiles();
    const int rows = rows_of_tile(task.count(false, to, local), part);
    if (rows == 0) return;
    const int begin = task.first[to * window.all_experts() + task.own(local)] + part * kTileRows;
    for (int row = begin + warp_id(); row < begin + rows; row += kCommWarps) {
      copy_row<Bytes>(y[row], units_at<Bytes>(window.row(window.me, task.buffer(), row)), units);
      if (values && lane_id() == 0) value_at(window.value(window.me, task.buffer(), row)) = values[row];
    }
    __syncthreads();
    if (threadIdx.x == 0) release_add(window.flag(to, task.buffer(), window.me, index), rows);
  }
};

template <int Bytes>
__global__ void __launch_bounds__(kCommThreads) publish_kernel(PublishJob<Bytes> job) {
  if (!job.task.free_to_write()) return;
  const Window& window = job.task.window;
  const int per_rank = window.experts * window.tiles();
  for (int item = blockIdx.x; item < window.all_tiles(); item += gridDim.x) {
    job.tile(item / per_rank, item % per_rank);
  }
}

template <typename T, int Bytes>
struct PullJob {
  Exchange task;
  UnitRows<Bytes> out;
  int units;
  unsigned* values;  // by choice; nullptr: none
  const int* place;  // [T, K]: owner * R + row there, R of the window; -1: none
  std::int64_t tokens;
  int choices;

  static constexpr int kUnits = 4;
  using Values = Numbers<T, Bytes>;

  __device__ __forceinline__ char* row_of(int place_there) const {
    const auto rows = static_cast<int>(task.window.rows());
    return task.window.row(place_there / rows, task.buffer(), place_there % rows);
  }

  // In the order of the choices, in fp32, rounded once.
  __device__ __forceinline__ void sum(std::int64_t token, int begin) const {
    Values sum[kUnits] = {};
    for (int k = 0; k < choices; ++k) {
      const int there = place[token * choices + k];
      if (there < 0) continue;
      const Unit<Bytes>* const from = units_at<Bytes>(row_of(there));
      Unit<Bytes> unit[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int at = begin + lane_id() + i * kWarpSize;
        unit[i] = at < units ? from[at] : Unit<Bytes>{};
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const Values part(unit[i]);
#pragma unroll
        for (int j = 0; j < Values::kCount; ++j) sum[i].at[j] += part.at[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int at = begin + lane_id() + i * kWarpSize;
      if (at < units) out[token][at] = sum[i].unit();
    }
  }

  __device__ __forceinline__ void token(std::int64_t token, bool there) const {
    for (int begin = 0; begin < units && there; begin += kUnits * kWarpSize) sum(token, begin);
    if (!there) fill_row<Bytes>(out[token], units, 0xff);
    for (int k = lane_id(); values && k < choices; k += kWarpSize) {
      const int at = place[token * choices + k], rows = static_cast<int>(task.window.rows());
      const bool has_one = there && at >= 0;
      const unsigned value = has_one ? value_at(task.window.value(at / rows, task.buffer(), at % rows)) : 0u;
      values[token * choices + k] = there ? value : ~0u;
    }
  }
};

template <typename T, int Bytes>
__global__ void __launch_bounds__(kCommThreads, 8) pull_kernel(PullJob<T, Bytes> job) {
  const Window& window = job.task.window;
  const int per_rank = window.experts * window.tiles();
  bool there = true;
  for (int item = threadIdx.x; item < window.all_tiles() && there; item += kCommThreads) {
    there = job.task.wait_for_tile(true, item / per_rank, item % per_rank);
  }
  there = __syncthreads_and(there) != 0;
  const std::int64_t step = std::int64_t{gridDim.x} * kCommWarps;
  for (std::int64_t token = std::int64_t{blockIdx.x} * kCommWarps + warp_id(); token < job.tokens; token += step) {
    job.token(token, there);
  }
}

// --------------------------------------------------------------------------------------------------------------------- finish

// After the kernel that waited, of one block. A rank that gave up says nothing.
static __global__ void __launch_bounds__(kCommThreads) finish_kernel(Exchange task, bool home) {
  const Window& window = task.window;
  if (acquire_load(window.claimed()) != 0) return;
  const int per_rank = window.experts * window.tiles();
  for (int item = threadIdx.x; item < window.all_tiles(); item += kCommThreads) {
    const int from = item / per_rank, index = item % per_rank;
    const int rows = rows_of_tile(task.count(home, from, index / window.tiles()), index % window.tiles());
    task.seen[std::int64_t{task.buffer()} * window.all_tiles() + item] += rows;
  }
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < window.ranks) release_store(window.done(peer, window.me), task.number);
}

// ------------------------------------------------------------------------------------------------------------------- launches

// `most`: at most so many blocks; 0: as many as there is work for.
inline unsigned comm_blocks(std::int64_t work, int most) {
  const std::int64_t wanted = work < 1 ? 1 : work;
  return static_cast<unsigned>(most > 0 && most < wanted ? most : wanted);
}

template <typename Count>
void launch_exchange_counts(const Exchange& task, const Count* mine, cudaStream_t stream) {
  launch(exchange_counts_kernel<Count>, dim3(task.window.ranks), dim3(kCommThreads), 0, stream, task, mine);
}

inline void launch_wait_counts(const Exchange& task, int* all, cudaStream_t stream) {
  launch(wait_counts_kernel, dim3(task.window.ranks), dim3(kCommThreads), 0, stream, task, all);
}

template <int Bytes>
void launch_push(const PushJob<Bytes>& job, int most, cudaStream_t stream) {
  const dim3 grid(comm_blocks(job.task.window.all_tiles(), most));
  launch(push_kernel<Bytes>, grid, dim3(kCommThreads), 0, stream, job);
}

inline void launch_finish(const Exchange& task, bool home, cudaStream_t stream) {
  launch(finish_kernel, dim3(1), dim3(kCommThreads), 0, stream, task, home);
}

template <int Bytes>
void launch_take(const TakeJob<Bytes>& job, int most, cudaStream_t stream) {
  const dim3 grid(comm_blocks(job.task.window.all_tiles(), most));
  launch(take_kernel<Bytes>, grid, dim3(kCommThreads), 0, stream, job);
  launch_finish(job.task, false, stream);
}

template <int Bytes>
void launch_publish(const PublishJob<Bytes>& job, int most, cudaStream_t stream) {
  const dim3 grid(comm_blocks(job.task.window.all_tiles(), most));
  launch(publish_kernel<Bytes>, grid, dim3(kCommThreads), 0, stream, job);
}

template <typename T, int Bytes>
void launch_pull(const PullJob<T, Bytes>& job, int most, cudaStream_t stream) {
  const dim3 grid(comm_blocks((job.tokens + kCommWarps - 1) / kCommWarps, most));
  launch(pull_kernel<T, Bytes>, grid, dim3(kCommThreads), 0, stream, job);
  launch_finish(job.task, true, stream);
}

}  // namespace mm
