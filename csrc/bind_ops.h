// The Python signatures of the operators, the same for every backend; ops.h says what the arguments mean.
//
// Tensors come in as torch tensors and leave as checked addresses. The last argument is what the backend runs on: a
// number of threads on the CPU, a stream on a GPU; before it, of an operator that has one, the address of a workspace.
// `Backend::run(args, where)` is called for the Args of ops.h, without the GIL; its tensors are on a device of
// `Backend::kDeviceType`.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>

#include "ops.h"
#include "tensor.h"

namespace steerserve {

template <class Backend, class Args>
void run_without_gil(const Args& args, int64_t where) {
  const pybind11::gil_scoped_release without_gil;
  Backend::run(args, where);
}

inline void check_limits(float max_norm, int64_t k, int64_t capacity) {
  if (std::isnan(max_norm)) wrong("max_norm", "NaN", "a number; infinity for no limit");
  if (k < 0 || k > capacity)
    wrong("k", std::to_string(k),
          "0 for no limit, or at most " + std::to_string(capacity) + ", the capacity of indices");
}

// Stages of a plan for `num_rows` rows.
inline int64_t num_stages(const Tensor& ptr, int64_t num_rows) {
  const int64_t num_segments = ptr.numel() - 1;
  if (num_segments < 0 || (num_rows ? num_segments % num_rows : num_segments))
    wrong("ptr", std::to_string(ptr.numel()) + " elements",
          "a multiple of the " + std::to_string(num_rows) + " rows of x, plus 1");
  return num_rows ? num_segments / num_rows : 0;
}

using Object = pybind11::handle;

template <class Backend>
void steer_delta(Object x_, Object ptr_, Object slot_, Object op_, Object value_, Object score_index_, Object W_enc_,
                 Object b_enc_, Object threshold_, Object max_norm_, Object normalization_, Object W_dec_,
                 Object score_ptr_, Object score_threshold_, Object score_, Object activation_, Object edit_,
                 Object x_norm_, int64_t where) {
  const Tensor x("x", x_), ptr("ptr", ptr_), slot("slot", slot_), op("op", op_), value("value", value_),
      score_index("score_index", score_index_), W_enc("W_enc", W_enc_), b_enc("b_enc", b_enc_),
      threshold("threshold", threshold_), max_norm("max_norm", max_norm_),
      normalization("normalization", normalization_), W_dec("W_dec", W_dec_), score_ptr("score_ptr", score_ptr_),
      score_threshold("score_threshold", score_threshold_), score("score", score_),
      activation("activation", activation_), edit("edit", edit_), x_norm("x_norm", x_norm_);
  const Checks check(x, Backend::kDeviceType);
  const int64_t num_rows = x.dims("[N, d]", 2).size(0), d = x.size(1);
  const int64_t num_slots = W_enc.dims("[K, d]", 2).size(0), nnz = slot.numel(), num_scores = score.numel();
  const int64_t stages = num_stages(ptr, num_rows), num_segments = num_rows * stages;
  SteerDeltaArgs args;
  args.x_type = check.row_type(x);
  args.x = check.rows(x, {num_rows, d});
  args.x_row_stride = x.row_stride();
  args.num_rows = num_rows;
  args.d = d;
  args.ptr = check.tensor<int32_t>(ptr, {num_segments + 1});
  args.num_stages = stages;
  args.slot = check.tensor<int32_t>(slot, {nnz});
  args.op = check.tensor<uint8_t>(op, {nnz});
  args.value = check.tensor<float>(value, {nnz});
  args.score_index = check.tensor<int32_t>(score_index, {nnz});
  args.nnz = nnz;
  args.w_type = check.weight_type(W_enc);
  args.W_enc = check.weights(W_enc, W_enc, {num_slots, d});
  args.b_enc = check.tensor<float>(b_enc, {num_slots});
  args.threshold = check.tensor<float>(threshold, {num_slots});
  args.max_norm = check.tensor<float>(max_norm, {num_slots});
  args.normalization = check.tensor<uint8_t>(normalization, {num_slots});
  args.W_dec = check.weights(W_dec, W_enc, {num_slots, d});
  args.num_slots = num_slots;
  args.score_ptr = check.tensor<int32_t>(score_ptr, {num_rows + 1});
  args.score_threshold = check.tensor<float>(score_threshold, {num_scores});
  args.score = check.tensor<float>(score, {num_scores});
  args.num_scores = num_scores;
  args.activation = check.tensor<float>(activation, {nnz});
  args.edit = check.tensor<float>(edit, {nnz});
  args.x_norm = check.tensor<float>(x_norm, {num_segments});
  run_without_gil<Backend>(args, where);
}

template <class Backend>
void sae_encode(Object x_, Object W_enc_, Object b_enc_, Object threshold_, float max_norm, int64_t k, Object indices_,
                Object values_, Object count_, uintptr_t workspace, int64_t where) {
  const Tensor x("x", x_), W_enc("W_enc", W_enc_), b_enc("b_enc", b_enc_), threshold("threshold", threshold_),
      indices("indices", indices_), values("values", values_), count("count", count_);
  const Checks check(x, Backend::kDeviceType);
  const int64_t num_rows = x.dims("[B, d]", 2).size(0), d = x.size(1);
  const int64_t d_sae = W_enc.dims("[d_sae, d]", 2).size(0), capacity = indices.dims("[B, capacity]", 2).size(1);
  check_limits(max_norm, k, capacity);
  SaeEncodeArgs args;
  args.x_type = check.row_type(x);
  args.x = check.rows(x, {num_rows, d});
  args.x_row_stride = x.row_stride();
  args.num_rows = num_rows;
  args.d = d;
  args.w_type = check.weight_type(W_enc);
  args.W_enc = check.weights(W_enc, W_enc, {d_sae, d});
  args.b_enc = check.tensor<float>(b_enc, {d_sae});
  args.threshold = check.tensor<float>(threshold, {d_sae});
  args.d_sae = d_sae;
  args.max_norm = max_norm;
  args.k = k;
  args.indices = check.tensor<int32_t>(indices, {num_rows, capacity});
  args.values = check.tensor<float>(values, {num_rows, capacity});
  args.capacity = capacity;
  args.count = check.tensor<int32_t>(count, {num_rows});
  args.workspace = reinterpret_cast<void*>(workspace);
  run_without_gil<Backend>(args, where);
}

template <class Backend>
void sae_decode(Object indices_, Object values_, Object count_, Object W_dec_, Object b_dec_, Object out_,
                int64_t where) {
  const Tensor indices("indices", indices_), values("values", values_), count("count", count_), W_dec("W_dec", W_dec_),
      b_dec("b_dec", b_dec_), out("out", out_);
  const Checks check(indices, Backend::kDeviceType);
  const int64_t num_rows = indices.dims("[B, capacity]", 2).size(0), capacity = indices.size(1);
  const int64_t d_sae = W_dec.dims("[d_sae, d]", 2).size(0), d = W_dec.size(1);
  SaeDecodeArgs args;
  args.indices = check.tensor<int32_t>(indices, {num_rows, capacity});
  args.values = check.tensor<float>(values, {num_rows, capacity});
  args.count = check.tensor<int32_t>(count, {num_rows});
  args.num_rows = num_rows;
  args.capacity = capacity;
  args.w_type = check.weight_type(W_dec);
  args.W_dec = check.weights(W_dec, W_dec, {d_sae, d});
  args.d_sae = d_sae;
  args.b_dec = check.tensor<float>(b_dec, {d});
  args.out_type = check.row_type(out);
  args.out = check.rows(out, {num_rows, d});
  args.out_row_stride = out.row_stride();
  args.d = d;
  run_without_gil<Backend>(args, where);
}

template <class Backend>
void sae_splice(Object x_, Object rows_, Object ptr_, Object feature_, Object op_, Object value_, Object W_enc_,
                Object b_enc_, Object threshold_, Object W_dec_, Object b_dec_, float max_norm, int64_t normalization,
                int64_t k, Object indices_, Object values_, Object count_, Object activation_, Object edit_,
                Object x_norm_, uintptr_t workspace, int64_t where) {
  const Tensor x("x", x_), rows("rows", rows_), ptr("ptr", ptr_), feature("feature", feature_), op("op", op_),
      value("value", value_), W_enc("W_enc", W_enc_), b_enc("b_enc", b_enc_), threshold("threshold", threshold_),
      W_dec("W_dec", W_dec_), b_dec("b_dec", b_dec_), indices("indices", indices_), values("values", values_),
      count("count", count_), activation("activation", activation_), edit("edit", edit_), x_norm("x_norm", x_norm_);
  const Checks check(x, Backend::kDeviceType);
  const int64_t num_x_rows = x.dims("[N, d]", 2).size(0), d = x.size(1), num_rows = rows.dims("[R]", 1).size(0);
  const int64_t nnz = feature.dims("[nnz]", 1).size(0), d_sae = W_enc.dims("[d_sae, d]", 2).size(0);
  const int64_t capacity = indices.dims("[R, capacity]", 2).size(1);
  check_limits(max_norm, k, capacity);
  if (normalization < 0 || normalization >= kNumNormalizations)
    wrong("normalization", std::to_string(normalization), "a Normalization");
  SaeSpliceArgs args;
  args.x_type = check.row_type(x);
  args.x = check.rows(x, {num_x_rows, d});
  args.x_row_stride = x.row_stride();
  args.num_x_rows = num_x_rows;
  args.d = d;
  args.rows = check.tensor<int32_t>(rows, {num_rows});
  args.num_rows = num_rows;
  args.ptr = check.tensor<int32_t>(ptr, {num_rows + 1});
  args.feature = check.tensor<int32_t>(feature, {nnz});
  args.op = check.tensor<uint8_t>(op, {nnz});
  args.value = check.tensor<float>(value, {nnz});
  args.nnz = nnz;
  args.w_type = check.weight_type(W_enc);
  args.W_enc = check.weights(W_enc, W_enc, {d_sae, d});
  args.b_enc = check.tensor<float>(b_enc, {d_sae});
  args.threshold = check.tensor<float>(threshold, {d_sae});
  args.W_dec = check.weights(W_dec, W_enc, {d_sae, d});
  args.b_dec = check.tensor<float>(b_dec, {d});
  args.d_sae = d_sae;
  args.max_norm = max_norm;
  args.normalization = static_cast<Normalization>(normalization);
  args.k = k;
  args.indices = check.tensor<int32_t>(indices, {num_rows, capacity});
  args.values = check.tensor<float>(values, {num_rows, capacity});
  args.capacity = capacity;
  args.count = check.tensor<int32_t>(count, {num_rows});
  args.activation = check.tensor<float>(activation, {nnz});
  args.edit = check.tensor<float>(edit, {nnz});
  args.x_norm = check.tensor<float>(x_norm, {num_rows});
  args.workspace = reinterpret_cast<void*>(workspace);
  run_without_gil<Backend>(args, where);
}

template <class Backend>
void head_scale(Object z_, Object ptr_, Object head_, Object scale_, Object z_norm_, int64_t where) {
  const Tensor z("z", z_), ptr("ptr", ptr_), head("head", head_), scale("scale", scale_), z_norm("z_norm", z_norm_);
  const Checks check(z, Backend::kDeviceType);
  const int64_t num_rows = z.dims("[N, H, d_head]", 3).size(0), num_heads = z.size(1), d_head = z.size(2);
  const int64_t nnz = head.dims("[nnz]", 1).size(0);
  HeadScaleArgs args;
  args.z_type = check.row_type(z);
  args.z = check.rows(z, {num_rows, num_heads, d_head});
  args.z_row_stride = z.row_stride();
  args.num_rows = num_rows;
  args.num_heads = num_heads;
  args.d_head = d_head;
  args.ptr = check.tensor<int32_t>(ptr, {num_rows + 1});
  args.head = check.tensor<int32_t>(head, {nnz});
  args.scale = check.tensor<float>(scale, {nnz});
  args.nnz = nnz;
  args.z_norm = check.tensor<float>(z_norm, {nnz});
  run_without_gil<Backend>(args, where);
}

template <class Backend>
void bind_ops(pybind11::module_& m) {
  TensorInterface::use(pybind11::module_::import("torch").attr("Tensor"));
  m.def("steer_delta", &steer_delta<Backend>);
  m.def("sae_encode", &sae_encode<Backend>);
  m.def("sae_decode", &sae_decode<Backend>);
  m.def("sae_splice", &sae_splice<Backend>);
  m.def("head_scale", &head_scale<Backend>);
}

}  // namespace steerserve
