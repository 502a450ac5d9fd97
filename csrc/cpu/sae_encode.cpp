#include "cpu/sae_encode.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <new>
#include <optional>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace steerserve {
namespace {

// A panel and a batch that meets it are read equally often when they are equally large; but a panel must stay in the
// second-level cache, and less than the least is all overhead.
constexpr int64_t kMinPanelBytes = 256 << 10, kMaxPanelBytes = 768 << 10;
constexpr int64_t kMaxPanelSize = 256;

int64_t size_of(DType type) { return type == DType::float32 ? 4 : 2; }

int64_t panel_size_of(const SaeEncodeArgs& args, const EncodeKernel& kernel) {
  const int64_t bytes = std::clamp(kernel.packed_size(args.num_rows, args.d), kMinPanelBytes, kMaxPanelBytes);
  const int64_t fitting = bytes / (std::max<int64_t>(args.d, 1) * size_of(args.w_type));
  return std::clamp(fitting / kernel.granule * kernel.granule, kernel.granule, kMaxPanelSize);
}

const EncodeKernel& select_kernel(const SaeEncodeArgs& args) {
#if defined(__x86_64__)
  const bool is_narrow = args.x_type == DType::bfloat16 && args.w_type == DType::bfloat16;
  if (simd_level() == SimdLevel::amx && is_narrow && args.d_sae >= encode_kernel_amx.granule) return encode_kernel_amx;
#endif
  return kernels().encode;
}

// The call as its threads share it.
class Encoder {
 public:
  Encoder(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, RowStats* stats, int num_threads,
          Scratch& scratch)
      : args_(args),
        kernel_(select_kernel(args)),
        rows_(rows),
        normalization_(normalization),
        stats_(stats),
        packed_(scratch.take<std::byte>(kernel_.packed_size(args.num_rows, args.d))),
        batch_{args, packed_, stats, panel_size_of(args, kernel_)},
        runs_(scratch.take<const Runs*>(num_threads)) {}

  // What thread `thread` of `team` does. All of them must run at the same time.
  void run(int thread, int team) {
    Scratch& scratch = Scratch::of_this_thread();
    const Scratch::Frame frame(scratch);
    std::optional<Runs> found;
    attempt([&] { pack(thread, team, scratch.take<float>(args_.d)); });
    wait(team);
    attempt([&] { encode(thread, team, scratch, found); });
    wait(team);
    attempt([&] {
      for (int64_t row = thread; row < args_.num_rows; row += team) store(row, team);
    });
    wait(team);  // the others read what this one found
  }

  // Some thread had no memory; nothing it found is complete.
  bool has_failed() const { return has_failed_; }

 private:
  static void wait(int team) {
    if (team == 1) return;
#pragma omp barrier
  }

  // An exception must not leave a parallel region, nor one thread miss a barrier.
  template <class Phase>
  void attempt(Phase phase) {
    if (has_failed_) return;
    try {
      phase();
    } catch (const std::bad_alloc&) {
      has_failed_ = true;
    }
  }

  void encode(int thread, int team, Scratch& scratch, std::optional<Runs>& found) {
    const int64_t begin = first_feature(thread, team), end = first_feature(thread + 1, team);
    const int64_t num_panels = (end - begin + batch_.panel_size - 1) / batch_.panel_size;
    found.emplace(scratch, args_.num_rows, num_panels, batch_.panel_size, args_.k, args_.capacity);
    for (int64_t row = 0; row < args_.num_rows; ++row)
      if (!is_inside(row)) found->exclude(row);
    kernel_.encode(batch_, begin, end, scratch.take<float>(kernel_.row_group * batch_.panel_size), *found);
    runs_[thread] = &*found;
  }

  bool is_inside(int64_t row) const { return std::isfinite(stats_[row].norm) && stats_[row].norm <= args_.max_norm; }

  int64_t first_feature(int thread, int team) const {
    const int64_t num_granules = (args_.d_sae + kernel_.granule - 1) / kernel_.granule;
    return std::min(num_granules * thread / team * kernel_.granule, args_.d_sae);
  }

  void pack(int thread, int team, float* wide) {
    for (int64_t begin = thread * kernel_.row_group; begin < args_.num_rows; begin += team * kernel_.row_group)
      kernel_.pack(args_, rows_, normalization_, begin, std::min(begin + kernel_.row_group, args_.num_rows), packed_,
                   stats_, wide);
  }

  void store(int64_t row, int team) const {
    int32_t* indices = args_.indices + row * args_.capacity;
    float* values = args_.values + row * args_.capacity;
    const RowOfRuns found(runs_, team, row);
    int64_t count = -1;
    if (std::isfinite(stats_[row].norm) && !found.is_broken())
      count = args_.k ? found.store_largest(args_.k, indices, values) : found.store(args_.capacity, indices, values);
    args_.count[row] = static_cast<int32_t>(count);
  }

  const SaeEncodeArgs& args_;
  const EncodeKernel& kernel_;
  const int32_t* rows_;
  Normalization normalization_;
  RowStats* stats_;
  void* packed_;
  EncodeBatch batch_;
  const Runs** runs_;  // of each thread
  std::atomic<bool> has_failed_{false};
};

}  // namespace

void encode_rows(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, RowStats* stats,
                 int num_threads) {
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  const int team = team_size(args.num_rows * args.d_sae * args.d, num_threads);
  Encoder encoder(args, rows, normalization, stats, team, scratch);
  if (team == 1) {  // the runtime would allocate a team even for one thread
    encoder.run(0, 1);
  } else {
#pragma omp parallel num_threads(team)
    encoder.run(omp_get_thread_num(), omp_get_num_threads());
  }
  if (encoder.has_failed()) throw std::bad_alloc();
}

void launch(const SaeEncodeArgs& args, int num_threads) {
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  encode_rows(args, nullptr, kNone, scratch.take<RowStats>(args.num_rows), num_threads);
}

}  // namespace steerserve
