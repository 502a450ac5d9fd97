// steer_delta: edit features of an activation in place, each row by its own plan.
//
// Take one row x [d] and one of its stages, with entries j = (slot, op, value). The bank holds one feature per
// slot: encoder row w, bias b, threshold t, largest norm m, decoder row u. In fp32:
//
//     pre_j = x · w_j + b_j
//     f_j   = pre_j if pre_j > t_j and |x| <= m_j else 0     the feature, as its SAE computes it
//     e_j   = f'_j − f_j, with f'_j = op_j(f_j, value_j)
//     x    <- x + Σ_j e_j u_j                            rounded once, to the type of x
//
// This equals Dec(f') + (x − Dec(f)), the SAE spliced in with its reconstruction error kept, at 4·d operations per
// entry instead of a full encode and decode. All entries of a stage read the same x; the next stage reads what
// this one left. A stage whose edits are all zero does not write x at all.
//
// Rows are ragged: stage s of row n owns the entries ptr[n·S + s] .. ptr[n·S + s + 1]. A row is computed by one
// thread in an order that depends on nothing but the row's own entries, so its result is bit-identical whatever
// its neighbours are and however many threads run.
//
// A non-finite pre_j is reported as the activation it is and edits nothing: the caller has a broken row, and must
// see that, not a plausible zero.
#pragma once

#include <cstdint>

namespace steerserve {

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

struct SteerDeltaArgs {
  void* x;  // [num_rows, d], float or bfloat16, consecutive rows x_row_stride elements apart
  bool x_is_bf16;
  int64_t x_row_stride;
  int64_t num_rows;
  int64_t d;
  const int32_t* ptr;  // [num_rows · num_stages + 1]
  int64_t num_stages;
  const int32_t* slot;  // [nnz]
  const uint8_t* op;    // [nnz]
  const float* value;   // [nnz]
  int64_t nnz;
  const float* W_enc;      // [num_slots, d]
  const float* b_enc;      // [num_slots]
  const float* threshold;  // [num_slots]
  const float* max_norm;   // [num_slots]
  const float* W_dec;      // [num_slots, d]
  int64_t num_slots;
  float* activation;  // out [nnz]: f
  float* edit;        // out [nnz]: e
  float* x_norm;      // out [num_rows · num_stages]: |x| before the stage; only stages that have entries
};

// Checks every index and operand, then edits x with at most `num_threads` threads.
// Throws std::invalid_argument naming the first bad element, in which case nothing has been written.
void steer_delta(const SteerDeltaArgs& args, int num_threads);

// One row at one instruction set. `scratch` holds d floats.
using SteerRow = void (*)(const SteerDeltaArgs& args, int64_t row, float* scratch);
SteerRow steer_row_scalar(bool x_is_bf16);
SteerRow steer_row_avx2(bool x_is_bf16);
SteerRow steer_row_avx512(bool x_is_bf16);

}  // namespace steerserve
