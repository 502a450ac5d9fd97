#include "cpu/runs.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/scratch.h"

namespace steerserve {
namespace {

// Places are taken from scratch by so many.
constexpr int64_t kPlaces = 1 << 14;

// Keeps the k largest, of equal ones the first, in their order. Returns the least value kept.
float keep_largest(Run& run, int64_t k, float* sort) {
  std::copy_n(run.values, run.count, sort);
  std::nth_element(sort, sort + k - 1, sort + run.count, std::greater<float>());
  const float least = sort[k - 1];
  int64_t num_ties = k - std::count_if(sort, sort + k, [least](float value) { return value > least; });
  int64_t kept = 0;
  for (int64_t i = 0; i < run.count; ++i) {
    if (run.values[i] < least || (run.values[i] == least && num_ties-- <= 0)) continue;
    run.indices[kept] = run.indices[i];
    run.values[kept++] = run.values[i];
  }
  run.count = kept;
  return least;
}

}  // namespace

Runs::Runs(Scratch& scratch, int64_t num_rows, int64_t num_panels, int64_t panel_size, int64_t k, int64_t capacity)
    : scratch_(scratch),
      num_rows_(num_rows),
      panel_size_(panel_size),
      k_(k),
      capacity_(k ? 2 * (k + panel_size) : capacity),  // so that a run is not full again soon after it was cut
      runs_per_row_(k ? 1 : num_panels),
      floors_(scratch.take<float>(num_rows)),
      num_found_(scratch.take<int64_t>(num_rows)),
      runs_(scratch.take<Run>(runs_per_row_ * num_rows)),
      sort_(k ? scratch.take<float>(capacity_) : nullptr) {
  std::fill_n(floors_, num_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(num_found_, num_rows, 0);
  if (!k) return;
  for (int64_t row = 0; row < num_rows; ++row)
    runs_[row] = {scratch.take<int32_t>(capacity_), scratch.take<float>(capacity_), 0};
}

float Runs::floor(int64_t row) const { return floors_[row]; }

void Runs::exclude(int64_t row) { floors_[row] = std::numeric_limits<float>::infinity(); }

Run Runs::open(int64_t panel, int64_t row) {
  if (k_) {
    Run& run = runs_[row];
    if (run.count + panel_size_ > capacity_) floors_[row] = keep_largest(run, k_, sort_);
    return {run.indices + run.count, run.values + run.count, 0};
  }
  if (free_.count < panel_size_) free_ = {scratch_.take<int32_t>(kPlaces), scratch_.take<float>(kPlaces), kPlaces};
  Run& run = runs_[panel * num_rows_ + row];
  run = {free_.indices, free_.values, 0};
  return run;
}

void Runs::close(int64_t panel, int64_t row, int64_t num_found) {
  if (num_found < 0 || num_found_[row] < 0) {
    num_found_[row] = -1;
    return;
  }
  if (k_) {
    runs_[row].count += num_found;
    return;
  }
  // What does not fit the result is counted but not kept.
  const int64_t num_kept = std::clamp<int64_t>(capacity_ - num_found_[row], 0, num_found);
  runs_[panel * num_rows_ + row].count = num_kept;
  num_found_[row] += num_found;
  free_ = {free_.indices + num_kept, free_.values + num_kept, free_.count - num_kept};
}

RowOfRuns::RowOfRuns(const Runs* const* team, int num_threads, int64_t row)
    : team_(team), num_threads_(num_threads), row_(row) {}

bool RowOfRuns::is_broken() const {
  return std::any_of(team_, team_ + num_threads_, [this](const Runs* runs) { return runs->num_found_[row_] < 0; });
}

int64_t RowOfRuns::store(int64_t capacity, int32_t* indices, float* values) const {
  int64_t num_found = 0, num_stored = 0;
  for (int thread = 0; thread < num_threads_; ++thread) {
    const Runs& runs = *team_[thread];
    num_found += runs.num_found_[row_];
    for (int64_t i = 0; i < runs.runs_per_row_; ++i) {
      const Run& run = runs.runs_[i * runs.num_rows_ + row_];
      const int64_t count = std::min(run.count, capacity - num_stored);
      std::copy_n(run.indices, count, indices + num_stored);
      std::copy_n(run.values, count, values + num_stored);
      num_stored += count;
    }
  }
  return num_found;
}

int64_t RowOfRuns::num_stored() const {
  int64_t total = 0;
  for (int thread = 0; thread < num_threads_; ++thread) total += team_[thread]->runs_[row_].count;
  return total;
}

int64_t RowOfRuns::store_largest(int64_t k, int32_t* indices, float* values) const {
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  const int64_t total = num_stored();
  Run all{scratch.take<int32_t>(total), scratch.take<float>(total), total};
  store(total, all.indices, all.values);
  if (total > k) keep_largest(all, k, scratch.take<float>(total));
  std::copy_n(all.indices, all.count, indices);
  std::copy_n(all.values, all.count, values);
  return all.count;
}

}  // namespace steerserve
