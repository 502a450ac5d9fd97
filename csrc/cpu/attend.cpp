#include "cpu/attend.h"

#include <algorithm>
#include <cstring>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace steerserve {
namespace {

// The same for all steps of a state: kernels differ in rounding.
const AttendKernel& select_kernel(const AttentionState& state) {
#if defined(__x86_64__)
  if (simd_level() == SimdLevel::amx && state.type == DType::bfloat16 && state.d_head % 32 == 0 &&
      state.block_size % 16 == 0)
    return attend_kernel_amx;
#endif
  return kernels().attend;
}

// Tokens that may be attended to together: of one row, at consecutive positions.
int64_t end_of_run(const AttentionState& state, int64_t first, int64_t num_tokens) {
  int64_t token = first + 1;
  while (token < num_tokens && state.row[token] == state.row[first] &&
         state.position[token] - int64_t{1} == state.position[token - 1])
    ++token;
  return token;
}

void check_tokens(const AttentionState& state, int64_t num_tokens) {
  if (num_tokens > state.max_tokens)
    throw std::invalid_argument("q: got " + std::to_string(num_tokens) + " tokens, expected at most " +
                                std::to_string(state.max_tokens) + ", the length of row and position");
  const int64_t max_positions = state.max_blocks * state.block_size;
  for (int64_t begin = 0, end; begin < num_tokens; begin = end) {
    end = end_of_run(state, begin, num_tokens);
    check_index("row", begin, state.row[begin], state.num_rows);
    check_index("position", begin, state.position[begin], max_positions);
    check_index("position", end - 1, state.position[end - 1], max_positions);
    const int64_t first_block = state.row[begin] * state.max_blocks;
    for (int64_t i = 0; i <= state.position[end - 1] / state.block_size; ++i)
      check_index("block_table", first_block + i, state.block_table[first_block + i], state.num_blocks);
  }
}

// Copies k and v of token n to their place.
void write_token(const AttendArgs& args, int64_t n) {
  const AttentionState& state = args.state;
  const int64_t item = state.type == DType::float32 ? 4 : 2;
  const int64_t block = state.block_table[state.row[n] * state.max_blocks + state.position[n] / state.block_size];
  for (int64_t head = 0; head < state.num_kv_heads; ++head) {
    const int64_t place =
        ((block * state.num_kv_heads + head) * state.block_size + state.position[n] % state.block_size) * state.d_head;
    const auto copy = [&](const HeadsView& from, void* cache) {
      std::memcpy(static_cast<char*>(cache) + place * item,
                  static_cast<const char*>(from.data) + (n * from.token_stride + head * from.head_stride) * item,
                  state.d_head * item);
    };
    copy(args.k, state.k_cache);
    copy(args.v, state.v_cache);
  }
}

// Keys that the tokens of the step meet, over all heads, times the size of a head: about the multiply-adds of a half.
int64_t amount_of_work(const AttendArgs& args) {
  int64_t num_keys = 0;
  for (int64_t n = 0; n < args.num_tokens; ++n) num_keys += args.state.position[n] + 1;
  return num_keys * args.num_heads * args.state.d_head;
}

}  // namespace

void launch(const AttendArgs& args, int num_threads) {
  const AttentionState& state = args.state;
  check_tokens(state, args.num_tokens);
  if (args.num_tokens == 0 || args.num_heads == 0) return;
  const AttendKernel& kernel = select_kernel(state);
  const int64_t group = args.num_heads / state.num_kv_heads;
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  auto* tiles = scratch.take<AttendTile>(args.num_tokens * (group / kernel.max_queries + 1));
  int64_t num_tiles = 0;
  for (int64_t begin = 0, end; begin < args.num_tokens; begin = end) {
    end = end_of_run(state, begin, args.num_tokens);
    const int64_t num_queries = (end - begin) * group;
    for (int64_t query = 0; query < num_queries; query += kernel.max_queries)
      tiles[num_tiles++] = {begin, query, std::min(query + kernel.max_queries, num_queries)};
  }
  const int team = team_size(amount_of_work(args), num_threads);
  const ScratchRows scratches(team, kernel.scratch_size(kernel.max_queries, state.d_head));
  for_each(args.num_tokens, team_size(args.num_tokens * state.num_kv_heads * state.d_head, team),
           [&](int64_t n, int) { write_token(args, n); });
  for_each(num_tiles * state.num_kv_heads, team, [&](int64_t task, int thread) {
    kernel.attend(args, tiles[task / state.num_kv_heads], task % state.num_kv_heads, scratches.row(thread));
  });
}

}  // namespace steerserve
