// CUDA kernels on the CPU, for tests: include "mm/device.cuh" and compile with -DMM_EMU.
//
// Emulated
//   __global__, __device__, __shared__ ...; threadIdx, blockIdx, blockDim, gridDim; 1 to 1024 threads in a block
//   mm::launch(kernel, grid, block, dynamic_smem, stream, args...), as in mm/launch.h; it returns when all has run
//   MM_SHARED(type, name, count) and MM_DYNAMIC_SHARED(type, name): shared memory of exact size on the heap, so that
//     AddressSanitizer sees what lies outside; filled with 0x7f before each block. A plain __shared__ works too, but
//     keeps what the last block left and has no red zones. `extern __shared__` does not compile: MM_DYNAMIC_SHARED.
//   __syncthreads (also _count, _and, _or), __syncwarp, __shfl_*_sync, __ballot_sync, __any_sync, __all_sync,
//     __match_any_sync, __match_all_sync, __reduce_*_sync. A warp operation takes effect when every lane of its mask
//     has come; as on a GPU only the __sync ones order memory.
//   atomics on 32- and 64-bit integers, relaxed; __threadfence, __threadfence_block; __nanosleep as "let others run"
//   vectors, __nv_bfloat16, __half and their conversions, bit intrinsics, __ldg and its kin, the common float functions
// Reported: mm::emu::Error (divergent barriers, exited threads that others wait for, a lane outside its mask, a shuffle
//   from such a lane, sizes that CUDA refuses, endless spinning); AddressSanitizer, UndefinedBehaviorSanitizer (also
//   misaligned vectors), ThreadSanitizer (races within a block without a barrier; between blocks with two OS threads or
//   more, whatever the timing). Without a sanitizer, a missing barrier shows as a wrong result for most seeds.
// Not emulated
//   time, the memory hierarchy, independent progress (a thread that spins must call __nanosleep, and can wait only for
//   its own block or one on another OS thread), float atomics (results here must repeat bit by bit), __activemask,
//   cooperative groups, tensor cores (mm/mma.cuh has a twin), cp.async, clusters, textures, inline PTX, streams.
//   Float functions are the host's: a GPU's expf may differ in the last bit.
// Environment: MM_EMU_SEED (default 1; 0: ascending order), MM_EMU_THREADS (OS threads over which blocks are dealt).
#pragma once

#include <bit>
#include <cassert>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "emu_fibres.h"
#include "emu_types.h"
#include "emu_waits.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __constant__ static
#define __shared__ static thread_local  // the fibres of a block share their OS thread

// One array per place in the source (and per instance of a template).
#define MM_SHARED(type, name, count)                   \
  static char name##_key_ = 0;                         \
  type* const name = static_cast<type*>(::mm::emu::Worker::current()->shared(&name##_key_, sizeof(type) * (count)))
#define MM_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::mm::emu::Worker::current()->dynamic_shared())

using cudaStream_t = struct CUstream_st*;
inline thread_local constinit uint3 threadIdx{}, blockIdx{};
inline thread_local constinit dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace mm {
namespace emu {

MM_EMU_QUIET inline void set_index(const Job& job, int thread, const unsigned block[3]) {
  const unsigned t = static_cast<unsigned>(thread), wide = job.block[0], high = job.block[1];
  threadIdx.x = t % wide, threadIdx.y = t / wide % high, threadIdx.z = t / wide / high;
  blockIdx.x = block[0], blockIdx.y = block[1], blockIdx.z = block[2];
  blockDim.x = wide, blockDim.y = high, blockDim.z = job.block[2];
  gridDim.x = job.grid[0], gridDim.y = job.grid[1], gridDim.z = job.grid[2];
}

inline void check_sizes(dim3 grid, dim3 block, std::size_t shared_bytes) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    throw Error("launch: " + std::to_string(threads) + " threads in a block, 1 to 1024 are possible");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error("launch: the grid is too large");
  if (shared_bytes > 227 * 1024) throw Error("launch: more than 227 KiB of shared memory");
}

template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline std::uint64_t take(const Group& group, int lane) { return group.value[group.source[lane]]; }

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  return from_bits<T>(Worker::current()->warp_operation(mask, take, to_bits(value), source));
}

// Folds the values of the mask's lanes, in the order of the lanes.
template <typename Fold, typename T>
T reduce(unsigned mask, T value) {
  const Combine combine = [](const Group& group, int) {
    bool first = true;
    T result{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(group.mask >> lane & 1u)) continue;
      const T mine = from_bits<T>(group.value[lane]);
      result = first ? mine : Fold{}(result, mine);
      first = false;
    }
    return to_bits(result);
  };
  return from_bits<T>(Worker::current()->warp_operation(mask, combine, to_bits(value), -1));
}

inline std::uint64_t ballot(const Group& group, int) {
  std::uint64_t lanes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    lanes |= std::uint64_t{(group.mask >> lane & 1u) && group.value[lane]} << lane;
  return lanes;
}

inline std::uint64_t match(const Group& group, int mine) {
  std::uint64_t lanes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    lanes |= std::uint64_t{(group.mask >> lane & 1u) && group.value[lane] == group.value[mine]} << lane;
  return lanes;
}

}  // namespace emu

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_smem, cudaStream_t,
            Arguments&&... args) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emu::check_sizes(grid, block, dynamic_smem);
  const std::tuple<Parameters...> values{static_cast<Parameters>(args)...};
  const auto body = [&] { std::apply(kernel, values); };
  emu::run_grid({body, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, dynamic_smem});
}

}  // namespace mm

// Barriers. The line tells apart barriers that only look like one.
inline void __syncthreads(unsigned line = __builtin_LINE()) { mm::emu::Worker::current()->barrier(0, line, 0); }
inline int __syncthreads_count(int predicate, unsigned line = __builtin_LINE()) {
  return mm::emu::Worker::current()->barrier(predicate, line, 0);
}
inline int __syncthreads_and(int predicate, unsigned line = __builtin_LINE()) {
  return mm::emu::Worker::current()->barrier(predicate, line, 1);
}
inline int __syncthreads_or(int predicate, unsigned line = __builtin_LINE()) {
  return mm::emu::Worker::current()->barrier(predicate, line, 2);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { mm::emu::Worker::current()->warp_sync(mask); }
inline void __nanosleep(unsigned) { mm::emu::Worker::current()->yield(); }
[[noreturn]] inline void __trap() { mm::emu::Worker::current()->fail("__trap"); }

// A fence orders through one address for all: more than a GPU's fence does, but nothing is ordered without it.
inline char mm_emu_fence;
inline void __threadfence() {
  mm::emu::release(&mm_emu_fence);
  mm::emu::acquire(&mm_emu_fence);
#ifndef MM_EMU_TSAN
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

// Warp operations.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = mm::emu::Worker::current()->lane();
  return mm::emu::shuffle(mask, value, lane / width * width + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = mm::emu::Worker::current()->lane(), source = lane - static_cast<int>(delta);
  return mm::emu::shuffle(mask, value, source < lane / width * width ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = mm::emu::Worker::current()->lane(), source = lane + static_cast<int>(delta);
  return mm::emu::shuffle(mask, value, source >= (lane / width + 1) * width ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = mm::emu::Worker::current()->lane(), source = lane ^ bits;
  return mm::emu::shuffle(mask, value, source >= (lane / width + 1) * width ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(mm::emu::Worker::current()->warp_operation(mask, mm::emu::ballot, predicate != 0, -1));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(
      mm::emu::Worker::current()->warp_operation(mask, mm::emu::match, mm::emu::to_bits(value), -1));
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal) {
  *all_equal = __match_any_sync(mask, value) == mask;
  return *all_equal ? mask : 0;
}
#define MM_EMU_REDUCE(type, name, operation)                                 \
  inline type __reduce_##name##_sync(unsigned mask, type value) {            \
    const auto fold = [](type a, type b) -> type { return operation(a, b); }; \
    return mm::emu::reduce<decltype(fold)>(mask, value);                     \
  }
MM_EMU_REDUCE(unsigned, add, std::plus<>{})
MM_EMU_REDUCE(unsigned, min, std::min)
MM_EMU_REDUCE(unsigned, max, std::max)
MM_EMU_REDUCE(int, add, std::plus<>{})
MM_EMU_REDUCE(int, min, std::min)
MM_EMU_REDUCE(int, max, std::max)
MM_EMU_REDUCE(unsigned, and, std::bit_and<>{})
MM_EMU_REDUCE(unsigned, or, std::bit_or<>{})
MM_EMU_REDUCE(unsigned, xor, std::bit_xor<>{})
#undef MM_EMU_REDUCE

// Atomics: int, unsigned, unsigned long long, as CUDA has them. Relaxed: they order nothing else.
namespace mm::emu {
template <typename T, typename Change>
T exchange(T* address, Change change) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &seen, change(seen), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
}  // namespace mm::emu
#define MM_EMU_ATOMICS(type)                                                                                        \
  inline type atomicAdd(type* p, type v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }                     \
  inline type atomicAnd(type* p, type v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }                     \
  inline type atomicOr(type* p, type v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }                       \
  inline type atomicXor(type* p, type v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }                     \
  inline type atomicExch(type* p, type v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }                   \
  inline type atomicMin(type* p, type v) { return mm::emu::exchange(p, [v](type a) { return a < v ? a : v; }); }    \
  inline type atomicMax(type* p, type v) { return mm::emu::exchange(p, [v](type a) { return a > v ? a : v; }); }    \
  inline type atomicCAS(type* p, type expected, type v) {                                                           \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                        \
    return expected;                                                                                                \
  }
MM_EMU_ATOMICS(int)
MM_EMU_ATOMICS(unsigned)
MM_EMU_ATOMICS(unsigned long long)
#undef MM_EMU_ATOMICS
inline int atomicSub(int* p, int v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicSub(unsigned* p, unsigned v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// Loads and stores with a cache hint.
#define MM_EMU_LOAD(name) \
  template <typename T>   \
  T name(const T* p) {    \
    return *p;            \
  }
#define MM_EMU_STORE(name)      \
  template <typename T>         \
  void name(T* p, T value) {    \
    *p = value;                 \
  }
MM_EMU_LOAD(__ldg)
MM_EMU_LOAD(__ldca)
MM_EMU_LOAD(__ldcg)
MM_EMU_LOAD(__ldcs)
MM_EMU_LOAD(__ldlu)
MM_EMU_LOAD(__ldcv)
MM_EMU_STORE(__stcg)
MM_EMU_STORE(__stcs)
MM_EMU_STORE(__stwb)
MM_EMU_STORE(__stwt)
#undef MM_EMU_LOAD
#undef MM_EMU_STORE

// Bits and floats.
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (v >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __frsqrt_rn(float v) { return 1.0f / std::sqrt(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
