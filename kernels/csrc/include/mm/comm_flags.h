// Flags that other ranks raise: release, acquire, and waits that end. For CUDA, for the CPU between processes, and for the
// emulator, where a test can ask for a fault.
//
// A flag is a running total that never goes back and may wrap around. Who raises it releases all that it wrote before;
// who has seen it raised may read that. On CUDA the threads of a block write, meet at a barrier, and one of them raises.
#pragma once

#include "mm/comm_window.h"

#if defined(__CUDACC__) && !defined(MM_EMU)
#include "mm/device.cuh"
#else
#include <atomic>
#include <chrono>
#include <thread>
#ifdef MM_EMU
#include "mm/device.cuh"
#endif
#endif

namespace mm {

// What a rank waits for.
enum class Awaited : int { counts = 1, rows = 2, results = 3, done = 4 };

#if defined(__CUDACC__) && !defined(MM_EMU)

__device__ __forceinline__ void release_add(unsigned* flag, unsigned more) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(flag), "r"(more) : "memory");
}

__device__ __forceinline__ void release_store(unsigned* flag, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned acquire_load(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ bool claim(unsigned* claimed) { return atomicCAS(claimed, 0u, 1u) == 0u; }

__device__ __forceinline__ std::int64_t nanoseconds() {
  std::int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ void pause_waiting(int) { __nanosleep(100); }
__device__ __forceinline__ void order_report() { __threadfence_system(); }
#define MM_WAITING __device__ __forceinline__

#else

#ifdef MM_EMU
namespace emu {
enum class Fault { none, relaxed_release, dropped_wait, no_ack };
inline Fault fault = Fault::none;
}  // namespace emu
inline std::memory_order releasing() {
  return emu::fault == emu::Fault::relaxed_release ? std::memory_order_relaxed : std::memory_order_release;
}
inline bool skipped(Awaited awaited) {
  return emu::fault == (awaited == Awaited::done ? emu::Fault::no_ack : emu::Fault::dropped_wait);
}
#else
inline constexpr std::memory_order releasing() { return std::memory_order_release; }
#endif

static_assert(std::atomic_ref<unsigned>::is_always_lock_free, "else flags would not work between processes");

inline void release_add(unsigned* flag, unsigned more) { std::atomic_ref(*flag).fetch_add(more, releasing()); }
inline void release_store(unsigned* flag, unsigned value) { std::atomic_ref(*flag).store(value, releasing()); }
inline unsigned acquire_load(const unsigned* flag) {
  return std::atomic_ref(*const_cast<unsigned*>(flag)).load(std::memory_order_acquire);
}

inline bool claim(unsigned* claimed) {
  unsigned nobody = 0;
  return std::atomic_ref(*claimed).compare_exchange_strong(nobody, 1u);
}

inline std::int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Ranks of a test share few processors, so who waits long lets the others run.
inline void pause_waiting(int tries) {
  if (tries < 200) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
#ifdef MM_EMU
  __nanosleep(100);  // the other fibres too
#endif
}

inline void order_report() {}  // whoever reads it has called the op
#define MM_WAITING inline

#endif

// Have at least `wanted` been counted? The two are less than 2^31 apart.
MM_ANYWHERE bool reached(unsigned total, unsigned wanted) { return static_cast<int>(total - wanted) >= 0; }

// What a rank writes down when it gives up: int32 [8], in memory that the host reads at any time.
//   0: 1 when the rest is there; 1: Awaited; 2: the peer; 3: expert of the group, -1: none; 4: first row of the tile;
//   5: exchange; 6: counted; 7: wanted
struct Patience {
  std::int64_t limit_ns;
  unsigned* claimed;  // in memory of the device: the first to give up writes, and the others stop waiting
  volatile int* report;
};

struct Where {
  Awaited awaited;
  int peer, expert, first_row, exchange;
};

MM_WAITING void give_up(const Patience& patience, const Where& where, unsigned counted, unsigned wanted) {
  if (!claim(patience.claimed)) return;
  patience.report[1] = static_cast<int>(where.awaited);
  patience.report[2] = where.peer;
  patience.report[3] = where.expert;
  patience.report[4] = where.first_row;
  patience.report[5] = where.exchange;
  patience.report[6] = static_cast<int>(counted);
  patience.report[7] = static_cast<int>(wanted);
  order_report();
  patience.report[0] = 1;
}

// Whether the flag reached `wanted` in time. False as well after any other wait of this rank has given up.
MM_WAITING bool wait_until(const unsigned* flag, unsigned wanted, const Patience& patience, const Where& where) {
#ifdef MM_EMU
  if (skipped(where.awaited)) return true;
#endif
  unsigned counted = acquire_load(flag);
  if (reached(counted, wanted)) return true;
  const std::int64_t begin = nanoseconds();
  for (int tries = 0; !reached(counted, wanted); ++tries) {
    if (acquire_load(patience.claimed) != 0) return false;
    if (nanoseconds() - begin > patience.limit_ns) {
      give_up(patience, where, counted, wanted);
      return false;
    }
    pause_waiting(tries);
    counted = acquire_load(flag);
  }
  return true;
}

}  // namespace mm
