// The engine of the emulator: the threads of a block as fibres of one OS thread. Kernels include cuda_emu.h only.
//
// A fibre runs until it waits (barrier, warp operation, yield) or returns; which ready one runs next is drawn from a
// seed, so a missing barrier shows as a wrong result. AddressSanitizer and ThreadSanitizer are told of every switch.
// To ThreadSanitizer each fibre is a thread, and only a barrier orders two of them, so it reports a missing barrier
// whatever the order of execution. The code here works without instrumentation (MM_EMU_QUIET): its own bookkeeping
// must neither be reported nor order what a kernel does not order.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emu_switch.h"

namespace mm::emu {

// What the emulator refuses or finds: thrown out of mm::launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  unsigned seed = 1;  // order of fibres and blocks; 0: ascending
  int threads = 1;    // OS threads over which blocks are dealt
};

// Read once from MM_EMU_SEED and MM_EMU_THREADS; a program may change them between launches.
inline Options& options() {
  static Options chosen = [] {
    Options o;
    if (const char* seed = std::getenv("MM_EMU_SEED")) o.seed = static_cast<unsigned>(std::atoi(seed));
    if (const char* threads = std::getenv("MM_EMU_THREADS")) o.threads = std::max(1, std::atoi(threads));
    return o;
  }();
  return chosen;
}

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;  // of a block
inline constexpr int kMaxShared = 64;     // arrays of shared memory
inline constexpr std::size_t kStackBytes = 256 * 1024;
inline constexpr unsigned char kPoison = 0x7f;  // fills shared memory before each block

// What the lanes of a mask bring to a warp operation; the operation itself is a function of it.
struct Group {
  unsigned mask;
  std::uint64_t value[kWarp];
  int source[kWarp];
};
using Combine = std::uint64_t (*)(const Group&, int lane);

enum class Wait : std::uint8_t { nothing, barrier, warp, left };

struct Fibre {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  int thread = 0;
  Wait wait = Wait::left;
  unsigned line = 0;  // of the barrier it waits at
  int predicate = 0;
  Combine combine = nullptr;
  unsigned mask = 0;
  int source = 0;
  std::uint64_t value = 0;
  std::uint64_t result = 0;
  unsigned barriers = 0;    // passed so far in this block
  unsigned warp_syncs = 0;  // of the whole warp
};

struct Job {
  std::function<void()> body;
  unsigned grid[3];
  unsigned block[3];
  std::size_t shared_bytes;
};

// Runs blocks on the OS thread that calls it.
class Worker {
 public:
  Worker() = default;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() { discard_fibres(); }

  static Worker*& current() {
    static thread_local Worker* worker = nullptr;
    return worker;
  }

  // Throws Error when the block cannot finish or misuses the machine.
  MM_EMU_QUIET void run_block(const Job& job, unsigned x, unsigned y, unsigned z, std::uint64_t seed);

  // Called by fibres.
  MM_EMU_QUIET int barrier(int predicate, unsigned line, int which);
  MM_EMU_QUIET std::uint64_t warp_operation(unsigned mask, Combine combine, std::uint64_t value, int source);
  MM_EMU_QUIET void warp_sync(unsigned mask);
  MM_EMU_QUIET void yield();
  MM_EMU_QUIET void* shared(const void* key, std::size_t bytes);
  [[noreturn]] MM_EMU_QUIET void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  MM_EMU_QUIET void* dynamic_shared() const { return dynamic_; }
  MM_EMU_QUIET int lane() const { return running_->thread % kWarp; }

 private:
  struct Named {
    const void* key;
    void* memory;
  };

  MM_EMU_QUIET void prepare(int threads);
  MM_EMU_QUIET void resume(Fibre& fibre);
  MM_EMU_QUIET void pause();
  MM_EMU_QUIET void pass_barrier();
  MM_EMU_QUIET void complete_group(unsigned mask, Combine combine);
  MM_EMU_QUIET static void entry();
  MM_EMU_QUIET void make_ready(Fibre& fibre);
  MM_EMU_QUIET Fibre& next_ready();
  std::string stuck() const;
  void discard_fibres();
  void free_shared();
  static void* poisoned(std::size_t bytes);

  // Plain arrays: fibres work on them, and the functions of a std::vector would be instrumented.
  Fibre* fibres_[kMaxThreads];
  int made_ = 0;
  Fibre* ready_[kMaxThreads];
  int ready_count_ = 0;
  Named shared_[kMaxShared];
  int shared_count_ = 0;
  const Job* job_ = nullptr;
  Fibre* running_ = nullptr;
  int threads_ = 0;
  int at_barrier_ = 0;
  int left_ = 0;
  int barrier_result_[3] = {0, 0, 0};  // count, and, or
  long idle_yields_ = 0;
  std::uint64_t random_ = 0;
  bool shuffle_ = true;
  char error_[256] = "";
  void* dynamic_ = nullptr;
  Context main_context_;
  void* main_tsan_ = nullptr;
  const void* main_stack_ = nullptr;
  std::size_t main_stack_bytes_ = 0;
  // Addresses ThreadSanitizer orders by; the two of a pair alternate, so that a fast fibre's next arrival does not
  // order what a slow one does after the last.
  char start_token_ = 0;
  char end_token_ = 0;
  char barrier_token_[2] = {0, 0};
  char warp_token_[32][2] = {};
  char part_token_[32] = {};
};

// Set before a fibre is entered; cuda_emu.h gives them their CUDA names.
struct Index {
  unsigned thread[3], block[3];
};
void set_index(const Job& job, int thread, const unsigned block[3]);

inline void* Worker::poisoned(std::size_t bytes) {
  // posix_memalign and not aligned_alloc: the size stays exact, so that AddressSanitizer sees the byte after it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, bytes ? bytes : 1) != 0) throw std::bad_alloc();
  std::memset(memory, kPoison, bytes);
  return memory;
}

inline void Worker::make_ready(Fibre& fibre) {
  fibre.wait = Wait::nothing;
  ready_[ready_count_++] = &fibre;
}

inline Fibre& Worker::next_ready() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const int drawn = shuffle_ ? static_cast<int>((random_ >> 16) % ready_count_) : 0;
  Fibre* fibre = ready_[drawn];
  --ready_count_;
  if (shuffle_) ready_[drawn] = ready_[ready_count_];
  for (int i = 0; !shuffle_ && i < ready_count_; ++i) ready_[i] = ready_[i + 1];
  return *fibre;
}

inline void Worker::prepare(int threads) {
  while (made_ < threads) {
    Fibre* fibre = new Fibre;
    fibre->thread = made_;
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);
    fibre->stack = static_cast<char*>(stack);
    fibre->context.start(fibre->stack, kStackBytes, &Worker::entry);
#ifdef MM_EMU_TSAN
    fibre->tsan = __tsan_create_fiber(0);
#endif
    fibres_[made_++] = fibre;
  }
}

inline void Worker::discard_fibres() {
  for (Fibre* fibre : std::span(fibres_, made_)) {
#ifdef MM_EMU_TSAN
    __tsan_destroy_fiber(fibre->tsan);
#endif
#ifdef MM_EMU_ASAN
    __asan_unpoison_memory_region(fibre->stack, kStackBytes);
#endif
    munmap(fibre->stack, kStackBytes);
    delete fibre;
  }
  made_ = 0;
  free_shared();
}

inline void Worker::free_shared() {
  for (const Named& named : std::span(shared_, shared_count_)) std::free(named.memory);
  shared_count_ = 0;
  std::free(dynamic_);
  dynamic_ = nullptr;
}

inline void Worker::resume(Fibre& fibre) {
  running_ = &fibre;
#ifdef MM_EMU_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibre.stack, kStackBytes);
#endif
#ifdef MM_EMU_TSAN
  __tsan_switch_to_fiber(fibre.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  main_context_.switch_to(fibre.context);
#ifdef MM_EMU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void Worker::pause() {
  Fibre& fibre = *running_;
#ifdef MM_EMU_ASAN
  __sanitizer_start_switch_fiber(&fibre.fake_stack, main_stack_, main_stack_bytes_);
#endif
#ifdef MM_EMU_TSAN
  __tsan_switch_to_fiber(main_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  fibre.context.switch_to(main_context_);
#ifdef MM_EMU_ASAN
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &main_stack_, &main_stack_bytes_);
#endif
}

// A fibre's whole life: one body for every block.
inline void Worker::entry() {
  Worker& worker = *current();
#ifdef MM_EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &worker.main_stack_, &worker.main_stack_bytes_);
#endif
  for (;;) {
    acquire(&worker.start_token_);
    worker.job_->body();
    release(&worker.end_token_);
    worker.running_->wait = Wait::left;
    ++worker.left_;
    worker.pause();
  }
}

inline void Worker::run_block(const Job& job, unsigned x, unsigned y, unsigned z, std::uint64_t seed) {
  const unsigned block[3] = {x, y, z};
  threads_ = static_cast<int>(job.block[0] * job.block[1] * job.block[2]);
  prepare(threads_);
  current() = this;
  job_ = &job;
  shuffle_ = seed != 0;
  random_ = seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
  at_barrier_ = left_ = 0;
  idle_yields_ = 0;
  dynamic_ = poisoned(job.shared_bytes);
#ifdef MM_EMU_TSAN
  main_tsan_ = __tsan_get_current_fiber();
#endif
  release(&start_token_);  // blocks on one OS thread follow each other, and use the same stacks
  ready_count_ = 0;
  for (int i = 0; i < threads_; ++i) {
    fibres_[i]->barriers = fibres_[i]->warp_syncs = 0;
    make_ready(*fibres_[i]);
  }
  while (ready_count_ > 0 && error_[0] == 0) {
    Fibre& next = next_ready();
    set_index(job, next.thread, block);
    resume(next);
  }
  acquire(&end_token_);
  if (left_ == threads_) return free_shared();
  const std::string what = "emulated kernel, block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                           std::to_string(z) + "): " + (error_[0] ? error_ : stuck());
  error_[0] = 0;
  discard_fibres();  // their stacks hold unfinished calls
  throw Error(what);
}

// Why nothing can run although some have not returned.
inline std::string Worker::stuck() const {
  std::string text;
  for (int i = 0; i < threads_ && text.size() < 2000; ++i) {
    const Fibre& fibre = *fibres_[i];
    const bool same = i > 0 && fibre.wait == fibres_[i - 1]->wait && fibre.line == fibres_[i - 1]->line &&
                      fibre.mask == fibres_[i - 1]->mask;
    if (same) continue;
    text += text.empty() ? "" : "; ";
    text += "from thread " + std::to_string(i) + ": ";
    char mask[16];
    std::snprintf(mask, sizeof mask, "0x%08x", fibre.mask);
    if (fibre.wait == Wait::left) text += "returned";
    if (fibre.wait == Wait::barrier) text += "waits at __syncthreads, line " + std::to_string(fibre.line);
    if (fibre.wait == Wait::warp) text += std::string("waits at a warp operation for lanes ") + mask;
  }
  return "divergent barrier: " + std::to_string(threads_ - left_) + " of " + std::to_string(threads_) +
         " threads wait for others that will not come (" + text + ")";
}

// Runs all blocks of a launch, dealt in turn to the OS threads, so that neighbours are never on the same one.
inline void run_grid(const Job& job) {
  const std::uint64_t blocks = std::uint64_t{job.grid[0]} * job.grid[1] * job.grid[2];
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::uint64_t random = options().seed * 0x9E3779B97F4A7C15ull;
  for (std::uint64_t i = blocks; options().seed != 0 && i > 1; --i) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i - 1], order[(random >> 33) % i]);
  }
  const int workers = static_cast<int>(std::min<std::uint64_t>(options().threads, blocks));
  // Kept from launch to launch: ThreadSanitizer would take a new fibre for an old one of the same number that is gone.
  static thread_local std::vector<std::unique_ptr<Worker>> pool;
  while (static_cast<int>(pool.size()) < workers) pool.push_back(std::make_unique<Worker>());
  std::vector<std::exception_ptr> errors(workers);
  auto work = [&errors, &job, &order, workers, blocks, worker_list = pool.data()](int mine) {
    Worker& worker = *worker_list[mine];
    try {
      for (std::uint64_t i = mine; i < blocks; i += workers) {
        const std::uint64_t b = order[i];
        const unsigned x = b % job.grid[0], y = b / job.grid[0] % job.grid[1], z = b / job.grid[0] / job.grid[1];
        worker.run_block(job, x, y, z, options().seed == 0 ? 0 : options().seed + b + 1);
      }
    } catch (...) {
      errors[mine] = std::current_exception();
    }
  };
  if (workers == 1) {
    work(0);
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < workers; ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
  }
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace mm::emu
