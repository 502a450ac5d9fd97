// What orders the memory accesses of emulated threads, as ThreadSanitizer is told it. Empty in other builds.
//
// TSan reports two accesses to one address, one of them a write, that nothing orders. In the CUDA memory model these
// order: the start and the end of a launch; barriers (__syncthreads, __syncwarp) among those that meet there; and the
// pair "fence, then a relaxed atomic" with "an atomic that reads it, then a fence". Shuffles, votes and atomics by
// themselves do not, and neither does the order in which the scheduler happens to run threads.
//
// A fence must order exactly what was done before it, not what follows up to the next atomic. TSan can only publish
// the whole present of a fiber; so the state at a fence is published to an address of its own, and carried on from
// there by an auxiliary fiber that has done nothing else.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>

#include "simt/fibers.h"

#if SIMT_TSAN
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {
namespace {

#if SIMT_TSAN

// An address that carries an order: what was done before a release of it comes before what is done after an acquire.
class Clock {
 public:
  void release() { __tsan_release(address_.get()); }
  void acquire() { __tsan_acquire(address_.get()); }

 private:
  struct Free {
    void operator()(void* address) const { std::free(address); }
  };
  std::unique_ptr<void, Free> address_{std::malloc(8)};
};

inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, kWithoutSynchronization); }

// Calls `action` as another fiber in the eyes of TSan.
template <class Action>
void as_fiber(void* fiber, const Action& action) {
  void* const self = __tsan_get_current_fiber();
  tsan_switch(fiber);
  action();
  tsan_switch(self);
}

// What comes before `from` comes before `to` as well.
inline void carry(Clock& from, Clock& to) {
  void* const carrier = __tsan_create_fiber(0);
  as_fiber(carrier, [&] {
    from.acquire();
    to.release();
  });
  __tsan_destroy_fiber(carrier);
}

// The part of one launch.
class HappensBefore {
 public:
  ~HappensBefore() { ends_.acquire(); }

  // Called by the host before threads start.
  void publish_host() { host_.release(); }

  // Called by a thread: at its start, and when it gets hold of what the host has made meanwhile.
  void after_host() { host_.acquire(); }

  // Called by a thread.
  void thread_ends() { ends_.release(); }

  // Called by the host when all participants wait at a barrier.
  void barrier(Fiber* const* fibers, size_t count) {
    Clock clock;
    for (size_t i = 0; i < count; ++i) as_fiber(fibers[i]->tsan, [&] { clock.release(); });
    for (size_t i = 0; i < count; ++i) as_fiber(fibers[i]->tsan, [&] { clock.acquire(); });
  }

  // Called by a thread.
  void fence() {
    Fences& mine = fences_[__tsan_get_current_fiber()];
    mine.before = std::make_unique<Clock>();
    mine.before->release();
    if (mine.read) mine.read->acquire();
  }

  // Called by a thread beside its atomic read-modify-write.
  void atomic(const void* address) {
    if (fences_.empty()) return;
    Fences& mine = fences_[__tsan_get_current_fiber()];
    const auto location = published_.find(address);
    if (location != published_.end()) {
      if (!mine.read) mine.read = std::make_unique<Clock>();
      carry(location->second, *mine.read);
    }
    if (mine.before) carry(*mine.before, published_[address]);
  }

  // Called by a thread.
  template <class Action>
  void as_host(const Fiber& host, const Action& action) {
    as_fiber(host.tsan, [&] {
      action();
      publish_host();
    });
  }

 private:
  struct Fences {
    std::unique_ptr<Clock> before;  // what the thread did before its last fence
    std::unique_ptr<Clock> read;    // what its atomics have read, ordered only by its next fence
  };
  Clock host_, ends_;
  std::map<void*, Fences> fences_;          // by thread
  std::map<const void*, Clock> published_;  // by address of the atomic
};

#else

class HappensBefore {
 public:
  void publish_host() {}
  void after_host() {}
  void thread_ends() {}
  void barrier(Fiber* const*, size_t) {}
  void fence() {}
  void atomic(const void*) {}
  template <class Action>
  void as_host(const Fiber&, const Action& action) {
    action();
  }
};

#endif

}  // namespace
}  // namespace simt
