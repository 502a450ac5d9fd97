// Sharing independent tasks among threads of the OpenMP runtime that torch uses.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace steerserve {

// How many threads `num_multiply_adds` are worth.
inline int team_size(int64_t num_multiply_adds, int num_threads) {
  // Starting threads costs a few microseconds, which is about this many multiply-adds.
  constexpr int64_t kMinWorkForThreads = 1 << 17;
  return num_multiply_adds < kMinWorkForThreads ? 1 : num_threads;
}

// body(thread, size) on every thread of a team of at most `team`, all at the same time. It may not throw.
template <class Body>
void run_team(int team, Body body) {
  if (team == 1) return body(0, 1);  // the runtime would allocate a team even for one thread
#pragma omp parallel num_threads(team)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// Within run_team: until all threads have come here.
inline void wait_for_team(int size) {
  if (size == 1) return;
#pragma omp barrier
}

// body(task, thread) for every task below `num_tasks`. Tasks are unequal, so they are handed out in small batches of
// neighbours, which a thread does in order.
template <class Body>
void for_each(int64_t num_tasks, int team, Body body) {
  if (team == 1) {  // the runtime would allocate a team even for one thread
    for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  const int64_t batch = std::max<int64_t>(num_tasks / (16 * team), 1);
#pragma omp parallel for schedule(dynamic, batch) num_threads(team)
  for (int64_t task = 0; task < num_tasks; ++task) body(task, omp_get_thread_num());
}

// A matrix cut into tasks: rows, and where they are few for the team, blocks of their columns.
class ColumnBlocks {
 public:
  ColumnBlocks(int64_t num_rows, int64_t num_columns, int team) : num_rows_(num_rows), num_columns_(num_columns) {
    const int64_t wanted = team == 1 ? 1 : (4 * team + num_rows - 1) / std::max<int64_t>(num_rows, 1);
    const int64_t lines = (num_columns + wanted * kLine - 1) / (wanted * kLine);
    width_ = std::max<int64_t>(lines, 1) * kLine;
    per_row_ = (num_columns + width_ - 1) / width_;
  }

  // Columns of a block, but for the last one of a row.
  int64_t width() const { return width_; }

  // body(row, begin, end, thread) for every block.
  template <class Body>
  void for_each_block(int team, Body body) const {
    for_each(num_rows_ * per_row_, team, [&](int64_t task, int thread) {
      const int64_t begin = task % per_row_ * width_;
      body(task / per_row_, begin, std::min(begin + width_, num_columns_), thread);
    });
  }

 private:
  static constexpr int64_t kLine = 16;  // blocks begin on a cache line of floats
  int64_t num_rows_, num_columns_, width_, per_row_;
};

}  // namespace steerserve
