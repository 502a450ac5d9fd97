// Fibers: flows of execution that one OS thread switches between by hand, one for each emulated CUDA thread.
//
// A switch saves the registers that a function call preserves and swaps stacks (x86-64, System V). A stack is followed
// downwards by a page that faults, so that running over its end stops the program instead of corrupting a neighbour.
//
// Sanitizers must be told of every switch: ASan where the stack is now, TSan whose memory accesses follow. TSan is told
// that a switch synchronizes nothing; see happens_before.h for what does.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "simt/engine.h"

#if SIMT_ASAN
extern "C" {
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#endif
#if SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// Pushes the registers a callee must preserve, leaves the stack pointer in *from, continues where `to` was left.
extern "C" void simt_switch_stack(void** from, void* to);
asm(R"(
.text
.type simt_switch_stack, @function
simt_switch_stack:
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
.size simt_switch_stack, . - simt_switch_stack
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned kWithoutSynchronization = 1;

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;        // TSan's
};

// A fiber on a new stack, which has nothing to do yet.
inline Fiber make_fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of another thread");
  mprotect(memory, kGuardBytes, PROT_NONE);
  Fiber fiber;
  fiber.stack = static_cast<char*>(memory) + kGuardBytes;
  fiber.stack_bytes = kStackBytes;
#if SIMT_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Lets the fiber call `entry`, which must not return, when it is next switched to.
inline void restart(Fiber& fiber, void (*entry)()) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
  // What simt_switch_stack pops: six registers, then the address it returns to. The call that it seems to return from
  // would have left the stack pointer 8 bytes off a multiple of 16, as every function expects on entry.
  constexpr size_t kNumPopped = 7;
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_bytes;
  void** const top = reinterpret_cast<void**>(end - 8);
  std::fill(top - kNumPopped, top + 1, nullptr);
  top[-1] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - kNumPopped;
}

// The fiber that is running already: its stack becomes known at the first switch away from it.
inline Fiber this_fiber() {
  Fiber fiber;
#if SIMT_TSAN
  fiber.tsan = __tsan_get_current_fiber();
#endif
  return fiber;
}

// Returns when somebody switches back to `from`, or never if `from` says it is finished.
inline void switch_fiber(Fiber& from, Fiber& to, bool finished = false) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, kWithoutSynchronization);
#endif
  (void)finished;
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing on a new fiber, which has just been switched to from `from`.
inline void finish_first_switch(Fiber& from) {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
  (void)from;
}

}  // namespace
}  // namespace simt
