// The machine that emulated kernels run on: what simt.h asks of it, and what tests set.
//
// A launch runs its blocks one after another. The threads of a block are fibers of one OS thread; each runs until it
// waits for others, then the next one runs. Nothing is concurrent, so a run can be repeated exactly; missing
// synchronization shows through the order of threads, which a test varies, and through TSan, which knows what orders
// memory whatever the order of running was.
//
// engine.cpp is compiled without the sanitizers' instrumentation (the memory it touches is its own), but with SIMT_ASAN
// or SIMT_TSAN defined, so that it tells them of fibers.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#ifndef SIMT_ASAN
#define SIMT_ASAN 0
#endif
#ifndef SIMT_TSAN
#define SIMT_TSAN 0
#endif

namespace simt {

// In which order the blocks of a launch, and the threads of a block, get to run.
enum class Order { forward, reverse, random };

void set_order(Order order);

// Prints "simt: " and the message, and ends the process: a kernel that broke the rules has no result.
[[noreturn]] void fail(const std::string& message);

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// What each thread of a warp has brought to a collective: the lanes that take part as bits, and a value from each.
struct Lanes {
  uint32_t members;
  uint64_t value[32];
};

// A collective operation of a warp, known by the address of this. Its result may differ from lane to lane, and depend
// on an argument of the lane.
struct Collective {
  const char* name;
  bool orders_memory;
  bool reads_lane;  // the argument is a lane, which must take part
  uint64_t (*result)(const Lanes& lanes, unsigned lane, unsigned argument);
};

// ----- called by an emulated thread -----

struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
Place place();  // by value: what the engine keeps must not be seen by TSan
unsigned lane();

// Waits until every thread of the block waits at the same site. Returns for how many of them `predicate` was true.
int wait_for_block(const char* name, bool predicate, Site site);

// Waits until every lane of `mask` waits for the same collective with the same mask at the same site.
uint64_t wait_for_warp(const Collective& collective, uint32_t mask, uint64_t value, unsigned argument, Site site);

// The block's array of that name in that function: a heap block of exactly this size, full of 0xFF.
void* shared_array(const char* function, const char* name, size_t bytes);
void* dynamic_shared();

void fence();
void before_atomic(const void* address);

// ----- called by the host -----

struct Shape {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
};

// Calls body(closure) once in each thread. What CUDA refuses is not run, and found by cudaGetLastError().
void run_launch(const Shape& shape, void (*body)(const void* closure), const void* closure);

}  // namespace simt
