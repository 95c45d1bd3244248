// Switching between fibres, and what the sanitizers have to know of it.
#pragma once

#if !defined(__x86_64__) || defined(MM_EMU_UCONTEXT)
#define MM_EMU_UCONTEXT 1
#include <ucontext.h>
#endif

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define MM_EMU_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define MM_EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MM_EMU_ASAN 1
#elif __has_feature(thread_sanitizer)
#define MM_EMU_TSAN 1
#endif
#endif
#ifdef MM_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MM_EMU_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#define MM_EMU_QUIET __attribute__((no_sanitize("thread")))

namespace mm::emu {

// Where an interrupted fibre goes on. swapcontext asks the kernel for the signal mask each time, nine tenths of its
// cost, so on x86-64 the registers that a call preserves are exchanged by hand.
#ifndef MM_EMU_UCONTEXT
extern "C" void mm_emu_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak mm_emu_switch
  .type mm_emu_switch, @function
mm_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mm_emu_switch, . - mm_emu_switch
  .popsection
)");

class Context {
 public:
  void start(char* stack, std::size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to; it also aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    at_ = top;
  }
  MM_EMU_QUIET void switch_to(Context& other) { mm_emu_switch(&at_, other.at_); }

 private:
  void* at_ = nullptr;
};
#else
class Context {
 public:
  void start(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = bytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
    at_.uc_stack.ss_size = 0;  // AddressSanitizer's swapcontext forgets the red zones of a stack that it is told of
  }
  MM_EMU_QUIET void switch_to(Context& other) { swapcontext(&at_, &other.at_); }

 private:
  ucontext_t at_;
};
#endif

// What one fibre did before `release` happened before what another does after `acquire` of the same address.
inline void release(void* address) {
#ifdef MM_EMU_TSAN
  __tsan_release(address);
#else
  (void)address;
#endif
}

inline void acquire(void* address) {
#ifdef MM_EMU_TSAN
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

}  // namespace mm::emu
