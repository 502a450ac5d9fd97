// The Python signatures of the operators, the same for every backend; ops.h says what the arguments mean.
//
// Addresses come in as integers and are trusted: the Python wrapper of each operator has checked type, shape and
// strides. No torch header is used, so one build serves every torch. The last argument is what the backend runs on:
// a number of threads on the CPU, a stream on a GPU.
#pragma once

#include <pybind11/pybind11.h>

#include "ops.h"

namespace steerserve {

namespace detail {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype(int code) { return static_cast<DType>(code); }

}  // namespace detail

// `Backend::run(args, where)` for each Args type of ops.h, called without the GIL.
template <class Backend>
void bind_ops(pybind11::module_& m) {
  using detail::at, detail::dtype;
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;

  m.def(
      "steer_delta",
      [](uintptr_t x, int x_type, int64_t x_row_stride, int64_t num_rows, int64_t d, uintptr_t ptr, int64_t num_stages,
         uintptr_t slot, uintptr_t op, uintptr_t value, uintptr_t score_index, int64_t nnz, uintptr_t W_enc,
         uintptr_t b_enc, uintptr_t threshold, uintptr_t max_norm, uintptr_t normalization, uintptr_t W_dec, int w_type,
         int64_t num_slots, uintptr_t score_ptr, uintptr_t score_threshold, uintptr_t score, int64_t num_scores,
         uintptr_t activation, uintptr_t edit, uintptr_t x_norm, int64_t where) {
        const SteerDeltaArgs args{at<void>(x),
                                  dtype(x_type),
                                  x_row_stride,
                                  num_rows,
                                  d,
                                  at<const int32_t>(ptr),
                                  num_stages,
                                  at<const int32_t>(slot),
                                  at<const uint8_t>(op),
                                  at<const float>(value),
                                  at<const int32_t>(score_index),
                                  nnz,
                                  at<const void>(W_enc),
                                  at<const float>(b_enc),
                                  at<const float>(threshold),
                                  at<const float>(max_norm),
                                  at<const uint8_t>(normalization),
                                  at<const void>(W_dec),
                                  dtype(w_type),
                                  num_slots,
                                  at<const int32_t>(score_ptr),
                                  at<const float>(score_threshold),
                                  at<float>(score),
                                  num_scores,
                                  at<float>(activation),
                                  at<float>(edit),
                                  at<float>(x_norm)};
        Backend::run(args, where);
      },
      without_gil);

  m.def(
      "sae_encode",
      [](uintptr_t x, int x_type, int64_t x_row_stride, int64_t num_rows, int64_t d, uintptr_t W_enc, int w_type,
         uintptr_t b_enc, uintptr_t threshold, int64_t d_sae, float max_norm, int64_t k, uintptr_t indices,
         uintptr_t values, int64_t capacity, uintptr_t count, uintptr_t workspace, int64_t where) {
        const SaeEncodeArgs args{at<const void>(x),
                                 dtype(x_type),
                                 x_row_stride,
                                 num_rows,
                                 d,
                                 at<const void>(W_enc),
                                 dtype(w_type),
                                 at<const float>(b_enc),
                                 at<const float>(threshold),
                                 d_sae,
                                 max_norm,
                                 k,
                                 at<int32_t>(indices),
                                 at<float>(values),
                                 capacity,
                                 at<int32_t>(count),
                                 at<void>(workspace)};
        Backend::run(args, where);
      },
      without_gil);

  m.def(
      "sae_decode",
      [](uintptr_t indices, uintptr_t values, uintptr_t count, int64_t num_rows, int64_t capacity, uintptr_t W_dec,
         int w_type, int64_t d_sae, uintptr_t b_dec, uintptr_t out, int out_type, int64_t out_row_stride, int64_t d,
         int64_t where) {
        const SaeDecodeArgs args{at<const int32_t>(indices),
                                 at<const float>(values),
                                 at<const int32_t>(count),
                                 num_rows,
                                 capacity,
                                 at<const void>(W_dec),
                                 dtype(w_type),
                                 d_sae,
                                 at<const float>(b_dec),
                                 at<void>(out),
                                 dtype(out_type),
                                 out_row_stride,
                                 d};
        Backend::run(args, where);
      },
      without_gil);

  m.def(
      "sae_splice",
      [](uintptr_t x, int x_type, int64_t x_row_stride, int64_t num_x_rows, int64_t d, uintptr_t rows, int64_t num_rows,
         uintptr_t ptr, uintptr_t feature, uintptr_t op, uintptr_t value, int64_t nnz, uintptr_t W_enc, uintptr_t b_enc,
         uintptr_t threshold, uintptr_t W_dec, int w_type, uintptr_t b_dec, int64_t d_sae, float max_norm,
         int normalization, int64_t k, uintptr_t indices, uintptr_t values, int64_t capacity, uintptr_t count,
         uintptr_t activation, uintptr_t edit, uintptr_t x_norm, uintptr_t workspace, int64_t where) {
        const SaeSpliceArgs args{at<void>(x),
                                 dtype(x_type),
                                 x_row_stride,
                                 num_x_rows,
                                 d,
                                 at<const int32_t>(rows),
                                 num_rows,
                                 at<const int32_t>(ptr),
                                 at<const int32_t>(feature),
                                 at<const uint8_t>(op),
                                 at<const float>(value),
                                 nnz,
                                 at<const void>(W_enc),
                                 at<const float>(b_enc),
                                 at<const float>(threshold),
                                 at<const void>(W_dec),
                                 dtype(w_type),
                                 at<const float>(b_dec),
                                 d_sae,
                                 max_norm,
                                 static_cast<Normalization>(normalization),
                                 k,
                                 at<int32_t>(indices),
                                 at<float>(values),
                                 capacity,
                                 at<int32_t>(count),
                                 at<float>(activation),
                                 at<float>(edit),
                                 at<float>(x_norm),
                                 at<void>(workspace)};
        Backend::run(args, where);
      },
      without_gil);

  m.def(
      "head_scale",
      [](uintptr_t z, int z_type, int64_t z_row_stride, int64_t num_rows, int64_t num_heads, int64_t d_head,
         uintptr_t ptr, uintptr_t head, uintptr_t scale, int64_t nnz, uintptr_t z_norm, int64_t where) {
        const HeadScaleArgs args{at<void>(z),
                                 dtype(z_type),
                                 z_row_stride,
                                 num_rows,
                                 num_heads,
                                 d_head,
                                 at<const int32_t>(ptr),
                                 at<const int32_t>(head),
                                 at<const float>(scale),
                                 nnz,
                                 at<float>(z_norm)};
        Backend::run(args, where);
      },
      without_gil);
}

}  // namespace steerserve
