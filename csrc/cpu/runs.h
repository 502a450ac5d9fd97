// Active features on their way from the tiles of sae_encode to its sparse rows.
//
// A run is a short list of features of one row, ascending. Threads, and the panels of a thread, cover ascending
// ranges of features, so a row's runs laid end to end are its result. Memory follows what is found, not what could be.
// Kernels include this: see vec.h for why nothing here may be inline.
#pragma once

#include <cstdint>

namespace steerserve {

class Scratch;

struct Run {
  int32_t* indices;
  float* values;
  int64_t count;
};

// What one thread finds in its features: a run for each panel and row or, when only the k largest are wanted, one
// growing run for each row, cut back to its k largest whenever it is full.
class Runs {
 public:
  Runs(Scratch& scratch, int64_t num_rows, int64_t num_panels, int64_t panel_size, int64_t k, int64_t capacity);

  // No feature at or below it can be in the row's result.
  float floor(int64_t row) const;

  // The row has no active features.
  void exclude(int64_t row);

  // Where the next features of a row go, those of a panel; there is room for all of them.
  Run open(int64_t panel, int64_t row);

  // The first `num_found` places of the run opened last have been filled; −1: what the row has there is not known.
  void close(int64_t panel, int64_t row, int64_t num_found);

 private:
  friend class RowOfRuns;

  Scratch& scratch_;
  int64_t num_rows_, panel_size_, k_, capacity_, runs_per_row_;
  float* floors_;       // [num_rows]
  int64_t* num_found_;  // [num_rows], −1 if not known
  Run* runs_;           // [runs_per_row, num_rows]
  Run free_ = {};       // places for runs to come
  float* sort_;         // values being ordered, if there is a k
};

// One row as a team of threads has found it.
class RowOfRuns {
 public:
  RowOfRuns(const Runs* const* team, int num_threads, int64_t row);

  // Some feature could not be told.
  bool is_broken() const;

  // Stores the first `capacity` features, ascending. Returns how many there are.
  int64_t store(int64_t capacity, int32_t* indices, float* values) const;

  // Stores the k largest, ascending by index. Returns how many there are, at most k.
  int64_t store_largest(int64_t k, int32_t* indices, float* values) const;

 private:
  int64_t num_stored() const;

  const Runs* const* team_;
  int num_threads_;
  int64_t row_;
};

}  // namespace steerserve
