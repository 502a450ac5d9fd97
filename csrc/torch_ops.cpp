#include "torch_ops.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "attention_states.h"
#include "cpu/launch.h"
#include "torch_abi.h"

namespace steerserve {
namespace {

int num_threads() {
  uint32_t count;
  check_status(TorchAbi::instance().get_num_threads(&count));
  return static_cast<int>(count);
}

double as_double(StableValue value) {
  double number;
  std::memcpy(&number, &value, sizeof(number));
  return number;
}

// Elements between rows of x [..., d]: the same along all leading axes.
int64_t stride_of_rows(const Tensor& x) {
  const int last = x.ndim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) wrong(x.name(), "elements of a row that lie apart", "contiguous rows");
  int64_t stride = x.size(last), num_rows = 1;
  for (int axis = last - 1; axis >= 0; --axis) {
    if (x.size(axis) == 1) continue;
    if (num_rows == 1)
      stride = x.stride(axis);
    else if (x.stride(axis) != stride * num_rows)
      wrong(x.name(), "rows that lie unevenly apart", "the same stride along all leading axes");
    num_rows *= x.size(axis);
  }
  return stride;
}

// linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor
void linear(StableValue* stack, uint64_t, uint64_t) {
  const TensorArgument x_argument(stack[0]), weight_argument(stack[1]);
  const std::unique_ptr<StableValue> bias_value(reinterpret_cast<StableValue*>(stack[2]));
  std::optional<TensorArgument> bias_argument;
  if (bias_value) bias_argument.emplace(*bias_value);

  const Tensor x = x_argument.named("x"), weight = weight_argument.named("weight");
  LinearArgs args;
  args.type = x.float_type(false);
  weight.dims("[d_out, d_in]", 2).check_dtype(x.dtype());
  weight.check_contiguous();
  args.d_out = weight.size(0);
  args.d_in = weight.size(1);
  if (x.ndim() == 0 || x.size(x.ndim() - 1) != args.d_in)
    wrong("x", x.shape(), "[..., " + std::to_string(args.d_in) + "], the d_in of weight");
  int64_t sizes[kMaxDims];
  std::copy_n(x.sizes(), x.ndim(), sizes);
  sizes[x.ndim() - 1] = args.d_out;
  args.num_rows = 1;
  for (int axis = 0; axis < x.ndim() - 1; ++axis) args.num_rows *= sizes[axis];
  args.x_row_stride = args.num_rows ? stride_of_rows(x) : 0;
  args.x = x.at<const void>();
  args.weight = weight.at<const void>();
  args.bias = nullptr;
  if (bias_argument) {
    const Tensor bias = bias_argument->named("bias");
    bias.check_dtype(x.dtype());
    bias.check_shape({args.d_out});
    bias.check_contiguous();
    args.bias = bias.at<const void>();
  }
  NewTensor out(sizes, x.ndim(), x_argument.dtype());
  args.out = out.data();
  launch(args, num_threads());
  stack[0] = out.release();
}

// A tensor [num_tokens, num_heads, d_head] of a state's type, where `num_heads` −1 means any.
HeadsView heads_view(const Tensor& tensor, DLDataType type, int64_t num_tokens, int64_t num_heads, int64_t d_head) {
  tensor.check_dtype(type);
  tensor.check_shape({num_tokens, num_heads, d_head});
  if (d_head > 1 && tensor.stride(2) != 1)
    wrong(tensor.name(), "elements of a head that lie apart", "contiguous heads");
  return {tensor.at<const void>(), tensor.stride(0), tensor.stride(1)};
}

// attend(Tensor q, Tensor k, Tensor v, int state, float scale, float softcap, int window) -> Tensor
void attend(StableValue* stack, uint64_t, uint64_t) {
  const TensorArgument q_argument(stack[0]), k_argument(stack[1]), v_argument(stack[2]);
  const Tensor q = q_argument.named("q"), k = k_argument.named("k"), v = v_argument.named("v");
  AttendArgs args;
  args.state = attention_state(static_cast<int64_t>(stack[3]));
  args.scale = static_cast<float>(as_double(stack[4]));
  args.softcap = static_cast<float>(as_double(stack[5]));
  args.window = static_cast<int64_t>(stack[6]);
  const int64_t num_kv_heads = args.state.num_kv_heads, d_head = args.state.d_head;
  args.num_tokens = q.dims("[N, H, d_head]", 3).size(0);
  args.num_heads = q.size(1);
  if (args.num_heads % num_kv_heads)
    wrong("q", std::to_string(args.num_heads) + " heads", "a multiple of " + std::to_string(num_kv_heads));
  const DLDataType type = args.state.type == DType::float32 ? DLDataType{2, 32, 1} : DLDataType{4, 16, 1};
  args.q = heads_view(q, type, args.num_tokens, args.num_heads, d_head);
  args.k = heads_view(k, type, args.num_tokens, num_kv_heads, d_head);
  args.v = heads_view(v, type, args.num_tokens, num_kv_heads, d_head);
  if (!(args.softcap >= 0)) wrong("softcap", std::to_string(args.softcap), "0 for none, or a positive number");
  if (args.window < 0) wrong("window", std::to_string(args.window), "0 for none, or a positive number");
  NewTensor out(q.sizes(), 3, q_argument.dtype());
  args.out = out.data();
  launch(args, num_threads());
  stack[0] = out.release();
}

}  // namespace

void register_torch_kernels() {
  const TorchAbi& torch = TorchAbi::instance();
  TorchLibrary library;  // lives as long as the process
  check_status(torch.library_init_impl("steerserve", "CPU", __FILE__, __LINE__, &library));
  check_status(torch.library_impl(library, "linear", linear));
  check_status(torch.library_impl(library, "attend", attend));
}

}  // namespace steerserve
