#include "simt/engine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "simt/fibers.h"
#include "simt/happens_before.h"

// Containers hold types of this file only: an instance of a template that kernels or tests use as well could be merged
// with their instrumented one, and TSan would see the scheduler race with the threads it runs.
namespace simt {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxGridX = 0x7fffffff;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kSharedBytesUnasked = 48 * 1024;  // more must be asked for, by cudaFuncSetAttribute
constexpr size_t kMaxSharedBytes = 227 * 1024;     // of sm_90; the least of the targets, sm_120, has 99 KiB
// Under TSan a fiber is a thread: if it serves two threads of a launch, a race between these is hidden. But TSan cannot
// tell apart more than 8192, and its cost grows with their number; so blocks share fibers with blocks well before them.
constexpr size_t kMaxFibers = SIMT_TSAN ? 2 * kMaxThreadsPerBlock : kMaxThreadsPerBlock;

size_t volume(dim3 dim) { return size_t{dim.x} * dim.y * dim.z; }

enum class State { ready, waits_for_block, waits_for_warp, finished };

struct Thread {
  Fiber* fiber = nullptr;
  Place place;
  unsigned index = 0;  // in the block
  State state = State::ready;
  // What it waits for, and what came of it.
  const char* operation = "";
  Site site{"", 0};
  const Collective* collective = nullptr;
  uint32_t mask = 0;
  uint64_t value = 0;
  unsigned argument = 0;
  uint64_t result = 0;

  unsigned lane() const { return index % kWarpSize; }
};

// A permutation of 0 .. size − 1, made anew for every use where the order is random.
class Permutation {
 public:
  explicit Permutation(size_t size) : positions_(size) {
    for (size_t i = 0; i < size; ++i) positions_[i].value = i;
  }

  void arrange(Order order) {
    const size_t size = positions_.size();
    if (order == Order::reverse)
      for (size_t i = 0; i < size; ++i) positions_[i].value = size - 1 - i;
    if (order == Order::random)
      for (size_t i = size; i > 1; --i) std::swap(positions_[i - 1].value, positions_[random() % i].value);
  }

  size_t size() const { return positions_.size(); }
  size_t operator[](size_t i) const { return positions_[i].value; }

 private:
  struct Position {
    size_t value;
  };

  static uint64_t random() {  // splitmix64
    static uint64_t state = 0;
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  std::vector<Position> positions_;
};

// Memory that a kernel must not trust: of exact size, for ASan, and full of NaN or −1.
class Poisoned {
 public:
  explicit Poisoned(size_t bytes) {
    if (bytes == 0) return;
    if (posix_memalign(&memory_, 16, bytes) != 0) fail("no memory for shared arrays");
    std::memset(memory_, 0xff, bytes);
  }
  Poisoned(Poisoned&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  ~Poisoned() { std::free(memory_); }

  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

struct ArrayName {
  const char* function;
  const char* name;
  bool operator<(const ArrayName& other) const {
    return std::tie(function, name) < std::tie(other.function, other.name);
  }
};

// Shared memory of one block. It is kept until the launch ends: if two blocks had theirs at one address, TSan would see
// a race.
struct SharedMemory {
  Poisoned dynamic;
  std::map<ArrayName, Poisoned> arrays;
  size_t bytes;
};

struct Limit {
  size_t dynamic_shared_bytes;
};

// All there is of state beyond a launch; it is touched by one OS thread.
struct Machine {
  Order order = Order::forward;
  std::deque<Fiber> fibers;  // in the order of their use by a launch; each launch begins with the first again
  std::map<const void*, Limit> limits;  // by kernel
  cudaError_t error = cudaSuccess;
};
Machine& machine() {
  static Machine instance;
  return instance;
}

// The launch in progress.
struct Launch {
  const Shape& shape;
  void (*body)(const void* closure);
  const void* closure;
  std::vector<SharedMemory> shared{};  // by block, in the order in which they run
  HappensBefore happens_before{};      // destroyed before, and so ordered before, shared memory
  Fiber host = this_fiber();
  Thread* running = nullptr;
  size_t num_threads = 0;  // so far
};
Launch* current = nullptr;

Fiber& next_fiber() {
  std::deque<Fiber>& fibers = machine().fibers;
  const size_t i = current->num_threads++ % kMaxFibers;
  if (i == fibers.size()) fibers.push_back(make_fiber());
  return fibers[i];
}

// A thread from its first instruction to its last.
void run_thread() {
  finish_first_switch(current->host);
  current->happens_before.after_host();
  current->body(current->closure);
  current->happens_before.thread_ends();
  Thread& self = *current->running;
  self.state = State::finished;
  switch_fiber(*self.fiber, current->host, /*finished=*/true);
  fail("a thread that had finished was run again");
}

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string describe(const Thread& thread) {
  return std::string(thread.operation) + " at " + thread.site.file + ":" + std::to_string(thread.site.line) +
         " by thread " + describe(thread.place.thread) + " of block " + describe(thread.place.block);
}

bool meet(const Thread& a, const Thread& b) {
  return a.state == b.state && a.collective == b.collective && a.mask == b.mask && a.operation == b.operation &&
         a.site.file == b.site.file && a.site.line == b.site.line;
}

class Block {
 public:
  explicit Block(uint3 index) : threads_(volume(current->shape.block)), running_order_(threads_.size()) {
    const dim3 dim = current->shape.block;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.fiber = &next_fiber();
      restart(*thread.fiber, run_thread);
      thread.index = i;
      thread.place = {{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)}, index, dim, current->shape.grid};
    }
  }

  void run() {
    current->happens_before.publish_host();
    while (num_live() > 0) {
      const bool ran = run_ready_threads();
      const bool collectives = complete_collectives();
      const bool barrier = complete_barrier();
      if (!ran && !collectives && !barrier) fail_in_deadlock();
    }
  }

 private:
  size_t num_live() const {
    return std::count_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state != State::finished; });
  }

  bool run_ready_threads() {
    bool any = false;
    running_order_.arrange(machine().order);
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[running_order_[i]];
      if (thread.state != State::ready) continue;
      current->running = &thread;
      switch_fiber(current->host, *thread.fiber);
      any = true;
    }
    return any;
  }

  bool complete_collectives() {
    bool any = false;
    for (Thread& thread : threads_)
      if (thread.state == State::waits_for_warp && complete_collective(thread)) any = true;
    return any;
  }

  // Lets the lanes go on that wait together with `first`, if none is missing. Lanes that have returned are not waited
  // for, as on hardware.
  bool complete_collective(const Thread& first) {
    Thread* const warp = &threads_[first.index - first.lane()];
    const unsigned warp_size = std::min<size_t>(kWarpSize, threads_.size() - warp->index);
    if (!(first.mask >> first.lane() & 1)) fail("a lane is not in its own mask: " + describe(first));
    if (uint64_t{first.mask} >> warp_size) fail("a mask names lanes that the block does not have: " + describe(first));
    Lanes lanes{};
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (!(first.mask >> lane & 1) || warp[lane].state == State::finished) continue;
      if (!meet(warp[lane], first)) return false;
      lanes.members |= 1u << lane;
      lanes.value[lane] = warp[lane].value;
    }
    const Collective& collective = *first.collective;
    Fiber* fibers[kWarpSize];
    size_t count = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (!(lanes.members >> lane & 1)) continue;
      Thread& thread = warp[lane];
      if (collective.reads_lane && !(lanes.members >> thread.argument & 1))
        fail("lane " + std::to_string(thread.argument) + " is read but does not take part: " + describe(thread));
      thread.result = collective.result(lanes, lane, thread.argument);
      thread.state = State::ready;
      fibers[count++] = thread.fiber;
    }
    if (collective.orders_memory) current->happens_before.barrier(fibers, count);
    return true;
  }

  // Lets all threads go on if they wait at the same barrier. Recent hardware does not wait for threads that have
  // returned, but CUDA does not promise that.
  bool complete_barrier() {
    const auto waits = [](const Thread& thread) { return thread.state == State::waits_for_block; };
    const auto first = std::find_if(threads_.begin(), threads_.end(), waits);
    if (first == threads_.end()) return false;
    const size_t num_waiting =
        std::count_if(threads_.begin(), threads_.end(), [&](const Thread& thread) { return meet(thread, *first); });
    if (num_waiting < num_live()) return false;
    if (num_waiting < threads_.size())
      fail(std::to_string(threads_.size() - num_waiting) + " threads have returned before " + describe(*first));
    std::vector<Fiber*> fibers;
    uint64_t num_true = 0;
    for (Thread& thread : threads_) {
      fibers.push_back(thread.fiber);
      num_true += thread.value;
    }
    for (Thread& thread : threads_) {
      thread.result = num_true;
      thread.state = State::ready;
    }
    current->happens_before.barrier(fibers.data(), fibers.size());
    return true;
  }

  [[noreturn]] void fail_in_deadlock() const {
    std::string message = "deadlock: no thread can go on";
    for (const Thread& thread : threads_) {
      const auto meets_it = [&](const Thread& other) { return meet(thread, other); };
      if (thread.state == State::finished || std::any_of(threads_.data(), &thread, meets_it)) continue;
      const auto count = std::count_if(threads_.begin(), threads_.end(), meets_it);
      message += "\n  " + std::to_string(count) + " wait(s) for others in " + describe(thread);
    }
    fail(message);
  }

  std::vector<Thread> threads_;
  Permutation running_order_;
};

void run_blocks() {
  const dim3 grid = current->shape.grid;
  Permutation order(volume(grid));
  order.arrange(machine().order);
  for (size_t i = 0; i < order.size(); ++i) {
    const unsigned index = order[i];
    const size_t bytes = current->shape.dynamic_shared_bytes;
    current->shared.push_back({Poisoned(bytes), {}, bytes});
    Block({index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)}).run();
  }
}

size_t max_shared_bytes(const void* kernel) {
  const auto limit = machine().limits.find(kernel);
  return limit == machine().limits.end() ? kSharedBytesUnasked
                                         : std::max(kSharedBytesUnasked, limit->second.dynamic_shared_bytes);
}

bool is_launchable(const Shape& shape) {
  return volume(shape.block) > 0 && volume(shape.block) <= kMaxThreadsPerBlock && volume(shape.grid) > 0 &&
         shape.grid.x <= kMaxGridX && shape.grid.y <= kMaxGridYZ && shape.grid.z <= kMaxGridYZ &&
         shape.dynamic_shared_bytes <= max_shared_bytes(shape.kernel);
}

uint64_t wait(Thread& self, State state, const char* operation, Site site) {
  self.operation = operation;
  self.site = site;
  self.state = state;
  switch_fiber(*self.fiber, current->host);
  return self.result;
}

}  // namespace

void set_order(Order order) { machine().order = order; }

void fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: %s\n", message.c_str());
  std::_Exit(1);
}

Place place() { return current->running->place; }

unsigned lane() { return current->running->lane(); }

int wait_for_block(const char* name, bool predicate, Site site) {
  Thread& self = *current->running;
  self.collective = nullptr;
  self.mask = 0;
  self.value = predicate;
  return static_cast<int>(wait(self, State::waits_for_block, name, site));
}

uint64_t wait_for_warp(const Collective& collective, uint32_t mask, uint64_t value, unsigned argument, Site site) {
  Thread& self = *current->running;
  self.collective = &collective;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  return wait(self, State::waits_for_warp, collective.name, site);
}

void* shared_array(const char* function, const char* name, size_t bytes) {
  SharedMemory& shared = current->shared.back();
  auto found = shared.arrays.find({function, name});
  if (found == shared.arrays.end()) {
    shared.bytes += bytes;
    if (shared.bytes > max_shared_bytes(current->shape.kernel)) fail("more shared memory than a block can have");
    current->happens_before.as_host(
        current->host, [&] { found = shared.arrays.emplace(ArrayName{function, name}, Poisoned(bytes)).first; });
  }
  current->happens_before.after_host();
  return found->second.get();
}

void* dynamic_shared() { return current->shared.back().dynamic.get(); }

void fence() { current->happens_before.fence(); }

void before_atomic(const void* address) { current->happens_before.atomic(address); }

void run_launch(const Shape& shape, void (*body)(const void* closure), const void* closure) {
  if (!is_launchable(shape)) {
    machine().error = cudaErrorInvalidConfiguration;
    return;
  }
  Launch launch{shape, body, closure};
  current = &launch;
  run_blocks();
  current = nullptr;
}

}  // namespace simt

// The part of the CUDA runtime that launchers call.

cudaError_t cudaGetLastError() { return std::exchange(simt::machine().error, cudaSuccess); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > static_cast<int>(simt::kMaxSharedBytes))
    return simt::machine().error = cudaErrorInvalidValue;
  simt::machine().limits[kernel] = {static_cast<size_t>(value)};
  return cudaSuccess;
}
