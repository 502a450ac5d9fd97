// The operators: what each computes, and the arguments that every backend (csrc/cpu, csrc/cuda) takes.
//
// Notation. An SAE feature j has encoder row w_j [d], bias b_j, threshold t_j and decoder row u_j [d]; weights are
// stored one feature a row, so that reading a feature reads one contiguous row. All arithmetic is float32 whatever
// the storage type, and a result is rounded once, when it is stored. ReLU, JumpReLU, BatchTopK (with its saved
// threshold) and Gated (folded) are all "pre if pre > threshold else 0"; TopK is the k largest of those above 0.
//
// Arguments are raw addresses, checked by bind_ops.h for type, shape and strides. Indices and operands lie in
// memory that only the backend reads at call time: a CPU backend checks them first and throws std::invalid_argument,
// a CUDA backend, which cannot, reports the entry as NaN and edits nothing.
#pragma once

#include <cstdint>

namespace steerserve {

// Values are fixed: the wrappers pass them as integers.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Values are fixed: plans carry them as bytes. Mirrored by steerserve.kernels.steer_delta.OpCode.
enum SteerOp : uint8_t {
  kMonitor = 0,      // f' = f
  kClamp = 1,        // f' = value where f > 0
  kClampAlways = 2,  // f' = value
  kClip = 3,         // f' = min(f, value)
  kScale = 4,        // f' = value · f
  kAdd = 5,          // f' = f + value
  kNumSteerOps = 6,
};

// How an SAE scales its input, after SAELens: pre = x · w / s + b, and what it adds to x is multiplied by s.
enum Normalization : uint8_t {
  kNone = 0,                 // s = 1
  kConstantNormRescale = 1,  // s = |x| / √d
  kLayerNorm = 2,            // s = the standard deviation of x (divisor d − 1) + 1e-5; the caller centres each w_j
  kNumNormalizations = 3,    // (w − mean(w)), which is the same as centring x
};

// steer_delta: edit features of an activation in place, each row by its own plan.
//
// Take one row x [d] and one of its stages, with entries j = (slot, op, value, score_index). The bank holds one
// feature per slot, with m_j the largest |x| it is defined on. In order:
//
//     pre_j = x · w_j / s_j + b_j
//     f_j   = pre_j if pre_j > t_j and |x| <= m_j else 0                      the feature, as its SAE computes it
//     score[score_index_j] += value_j · f_j     for monitors with a score_index: value is the feature's weight
//     e_j   = f'_j − f_j, with f'_j = op_j(f_j, value_j)
//             0 where score_index_j names a gate that is shut: score <= score_threshold
//     x    <- x + Σ_j s_j e_j u_j                                              rounded once, to the type of x
//
// This equals s·Dec(f') + (x − s·Dec(f)), the SAE spliced in with its reconstruction error kept, at 4·d operations
// per entry instead of a full encode and decode. All entries of a stage read the same x; the next stage reads what
// this one left. A stage whose edits are all zero does not write x at all.
//
// Rows are ragged: stage s of row n owns the entries ptr[n·S + s] .. ptr[n·S + s + 1]; entries from ptr[N·S] on are
// spare room and not read. Scores too: row n owns score_ptr[n] .. score_ptr[n + 1] and may use no others. Scores are
// added to what the caller left there (zero, or a score of an earlier site or token). A NaN score opens its gates.
//
// A row is computed in an order that depends on nothing but the row's own entries, so its result is bit-identical
// whatever its neighbours are and however many threads run.
//
// A non-finite pre_j is reported as the activation it is, and a NaN threshold or max_norm gives NaN; neither edits
// anything: the caller has a broken row or bank, and must see that, not a plausible zero.
struct SteerDeltaArgs {
  void* x;  // [num_rows, d], consecutive rows x_row_stride elements apart
  DType x_type;
  int64_t x_row_stride, num_rows, d;
  const int32_t* ptr;  // [num_rows · num_stages + 1]
  int64_t num_stages;
  const int32_t* slot;         // [nnz]
  const uint8_t* op;           // [nnz]
  const float* value;          // [nnz]
  const int32_t* score_index;  // [nnz], −1: neither feeds a score nor is gated
  int64_t nnz;
  const void* W_enc;             // [num_slots, d]
  const float* b_enc;            // [num_slots]
  const float* threshold;        // [num_slots]
  const float* max_norm;         // [num_slots]
  const uint8_t* normalization;  // [num_slots]
  const void* W_dec;             // [num_slots, d]
  DType w_type;                  // of W_enc and W_dec
  int64_t num_slots;
  const int32_t* score_ptr;      // [num_rows + 1]
  const float* score_threshold;  // [num_scores]
  float* score;                  // inout [num_scores]
  int64_t num_scores;
  float* activation;  // out [nnz]: f
  float* edit;        // out [nnz]: e
  float* x_norm;      // out [num_rows · num_stages]: |x| before the stage; only stages that have entries
};

// sae_encode: all active features of each row, as a sparse row; the dense [num_rows, d_sae] is never in memory.
//
//     pre_j = x · w_j + b_j,   active: pre_j > t_j and |x| <= max_norm;   of these the k largest, if k > 0
//
// Row n gets its active features in ascending order of index: indices[n, :count[n]] and values. Of equal values the
// one with the lower index is larger. count is the true number even where it exceeds the capacity; then the first
// `capacity` are stored, and the caller must not use the row as complete. A row whose |x| is not finite has count −1,
// and so has one with a NaN among its pre_j or t_j: a broken bank must not look like silence. What lies beyond a row's
// count is not written.
struct SaeEncodeArgs {
  const void* x;  // [num_rows, d]
  DType x_type;
  int64_t x_row_stride, num_rows, d;
  const void* W_enc;  // [d_sae, d]
  DType w_type;
  const float* b_enc;      // [d_sae]
  const float* threshold;  // [d_sae]
  int64_t d_sae;
  float max_norm;
  int64_t k;         // 0: no limit; else at most capacity
  int32_t* indices;  // out [num_rows, capacity]
  float* values;     // out [num_rows, capacity]
  int64_t capacity;
  int32_t* count;   // out [num_rows]
  void* workspace;  // CUDA: sae_encode_workspace() bytes, 16-byte aligned; CPU: not used
};

// sae_decode: out = Σ_j value_j u_j + b_dec for sparse rows. A row whose count is negative or beyond the capacity is
// not known, and decodes to NaN.
struct SaeDecodeArgs {
  const int32_t* indices;  // [num_rows, capacity]
  const float* values;     // [num_rows, capacity]
  const int32_t* count;    // [num_rows]
  int64_t num_rows, capacity;
  const void* W_dec;  // [d_sae, d]
  DType w_type;
  int64_t d_sae;
  const float* b_dec;  // [d]
  void* out;           // out [num_rows, d]
  DType out_type;
  int64_t out_row_stride, d;
};

// sae_splice: replace activations by their reconstruction from edited features, in place.
//
//     f  = the full encode of x, normalized;     f' = f with the row's entries j = (feature, op, value) applied
//     x <- s·(Σ_j f'_j u_j + b_dec) + μ,         μ the mean of x under kLayerNorm, else 0
//
// Only the rows of x that `rows` names (ascending, distinct) are read or written; entry i of `rows` owns
// ptr[i] .. ptr[i + 1]. Beyond max_norm the SAE says nothing about x: there f = 0 and only the edits are added,
// x <- x + s·Σ_j e_j u_j. A row that is broken (|x| not finite, count −1) or has more active features than
// `capacity` is left alone, and its entries' activations are NaN.
// indices, values and count are those of sae_encode, before any edit.
struct SaeSpliceArgs {
  void* x;  // [num_x_rows, d]
  DType x_type;
  int64_t x_row_stride, num_x_rows, d;
  const int32_t* rows;  // [num_rows]
  int64_t num_rows;
  const int32_t* ptr;      // [num_rows + 1]
  const int32_t* feature;  // [nnz]
  const uint8_t* op;       // [nnz]
  const float* value;      // [nnz]
  int64_t nnz;
  const void* W_enc;       // [d_sae, d]
  const float* b_enc;      // [d_sae]
  const float* threshold;  // [d_sae]
  const void* W_dec;       // [d_sae, d]
  DType w_type;
  const float* b_dec;  // [d]
  int64_t d_sae;
  float max_norm;
  Normalization normalization;
  int64_t k;
  int32_t* indices;  // out [num_rows, capacity]
  float* values;     // out [num_rows, capacity]
  int64_t capacity;
  int32_t* count;     // out [num_rows]
  float* activation;  // out [nnz]
  float* edit;        // out [nnz]
  float* x_norm;      // out [num_rows]
  void* workspace;    // CUDA: sae_splice_workspace() bytes, 16-byte aligned; CPU: not used
};

// head_scale: scale attention heads' outputs in place, z[n, head, :] *= scale, each row by its own entries in order.
// A scale of 1 does not write.
struct HeadScaleArgs {
  void* z;  // [num_rows, num_heads, d_head], consecutive rows z_row_stride elements apart, heads contiguous
  DType z_type;
  int64_t z_row_stride, num_rows, num_heads, d_head;
  const int32_t* ptr;   // [num_rows + 1]
  const int32_t* head;  // [nnz]
  const float* scale;   // [nnz]
  int64_t nnz;
  float* z_norm;  // out [nnz]: |z[n, head, :]| before the entry
};

// linear: out = x · weightᵀ + bias, summed in float32 and rounded once. All four have one type, float32 or bfloat16.
//
// An element of out is summed in an order fixed by d_in and d_out alone: a row has the same bits alone, in any batch,
// at any place of it and on any number of threads.
struct LinearArgs {
  const void* x;  // [num_rows, d_in]
  DType type;
  int64_t x_row_stride, num_rows, d_in;
  const void* weight;  // [d_out, d_in]
  const void* bias;    // [d_out] or null
  void* out;           // out [num_rows, d_out]
  int64_t d_out;
};

// The KV cache of one layer, and where the tokens of the running step belong. Position p of row r lies in block
// block_table[r, p / block_size], at p % block_size.
struct AttentionState {
  void *k_cache, *v_cache;  // [num_blocks, num_kv_heads, block_size, d_head]
  DType type;
  int64_t num_blocks, num_kv_heads, block_size, d_head;
  const int32_t* block_table;  // [num_rows, max_blocks]
  int64_t num_rows, max_blocks;
  const int32_t *row, *position;  // [max_tokens]: of each token of the step
  int64_t max_tokens;
};

// A tensor [num_tokens, heads, d_head] whose tokens and heads may lie apart.
struct HeadsView {
  const void* data;
  int64_t token_stride, head_stride;
};

// attend: causal attention of a flat batch of tokens over a paged KV cache.
//
// First k and v of every token n are written to the cache at (row[n], position[n]). Then for every head h, which reads
// KV head h / (num_heads / num_kv_heads), over the visible positions p of its row, p <= position[n] and, with a window,
// p > position[n] - window:
//
//     s_p = scale · q[n, h] · k_p;   with a softcap c: s_p <- c · tanh(s_p / c)
//     out[n, h] = Σ_p exp(s_p) v_p / Σ_p exp(s_p)
//
// in float32, rounded once. Positions are taken in order, in tiles counted from position 0, so that a token's bits
// depend on its q and on the visible part of its row alone: neither on how a prompt was cut into steps nor on
// neighbours or threads. What is not visible is not read. A (row, position) may occur once in a step.
struct AttendArgs {
  AttentionState state;
  HeadsView q, k, v;
  int64_t num_tokens, num_heads;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  void* out;             // out [num_tokens, num_heads, d_head]
};

}  // namespace steerserve
