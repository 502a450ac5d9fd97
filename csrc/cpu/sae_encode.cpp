#include "cpu/sae_encode.h"

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

const EncodeKernel& select_kernel(const SaeEncodeArgs& args) {
#if defined(__x86_64__)
  const bool is_narrow = args.x_type == DType::bfloat16 && args.w_type == DType::bfloat16;
  if (simd_level() == SimdLevel::amx && is_narrow && args.d_sae >= encode_kernel_amx.packing.granule)
    return encode_kernel_amx;
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
        packed_(scratch.take<std::byte>(kernel_.packing.size(args.num_rows, args.d))),
        batch_{args,
               {packed_, args.num_rows, args.d, args.W_enc, args.w_type,
                panel_size(kernel_.packing, args.num_rows, args.d, args.w_type)},
               stats},
        runs_(scratch.take<const Runs*>(num_threads)) {}

  // What thread `thread` of `team` does. All of them must run at the same time.
  void run(int thread, int team) {
    Scratch& scratch = Scratch::of_this_thread();
    const Scratch::Frame frame(scratch);
    std::optional<Runs> found;
    attempt([&] { pack(thread, team, scratch.take<float>(args_.d)); });
    wait_for_team(team);
    attempt([&] { encode(thread, team, scratch, found); });
    wait_for_team(team);
    attempt([&] {
      for (int64_t row = thread; row < args_.num_rows; row += team) store(row, team);
    });
    wait_for_team(team);  // the others read what this one found
  }

  // Some thread had no memory; nothing it found is complete.
  bool has_failed() const { return has_failed_; }

 private:
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
    const int64_t begin = first_feature(kernel_.packing, args_.d_sae, thread, team),
                  end = first_feature(kernel_.packing, args_.d_sae, thread + 1, team);
    const int64_t num_panels = (end - begin + batch_.product.panel_size - 1) / batch_.product.panel_size;
    found.emplace(scratch, args_.num_rows, num_panels, batch_.product.panel_size, args_.k, args_.capacity);
    for (int64_t row = 0; row < args_.num_rows; ++row)
      if (!is_inside(row)) found->exclude(row);
    kernel_.encode(batch_, begin, end, scratch.take<float>(kernel_.packing.row_group * batch_.product.panel_size),
                   *found);
    runs_[thread] = &*found;
  }

  bool is_inside(int64_t row) const { return std::isfinite(stats_[row].norm) && stats_[row].norm <= args_.max_norm; }

  void pack(int thread, int team, float* wide) {
    for (int64_t begin = thread * kernel_.packing.row_group; begin < args_.num_rows;
         begin += team * kernel_.packing.row_group)
      kernel_.pack(args_, rows_, normalization_, begin, std::min(begin + kernel_.packing.row_group, args_.num_rows),
                   packed_, stats_, wide);
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
  run_team(team, [&](int thread, int size) { encoder.run(thread, size); });
  if (encoder.has_failed()) throw std::bad_alloc();
}

void launch(const SaeEncodeArgs& args, int num_threads) {
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  encode_rows(args, nullptr, kNone, scratch.take<RowStats>(args.num_rows), num_threads);
}

}  // namespace steerserve
