// Co-attention between the streams on NVIDIA GPUs: checks, allocation, dense products of the
// backward, registration.
#include "cuda/co_attention.h"

#include "bindings/cuda/dense.h"

namespace dsnet {
namespace {

// Everything that both directions read, alive as long as this is.
class Inputs {
 public:
  Inputs(const Tensor& local, const Tensor& global, const CoAttentionParameters& p, double eps,
      double dropout_p, const OptionalTensor& seed)
      : local_(as_contiguous(local)),
        global_(as_contiguous(global)),
        global_norm_weight_("global_norm_weight", p.global_norm_weight, local),
        global_norm_bias_("global_norm_bias", p.global_norm_bias, local),
        local_qkv_weight_("local_qkv_weight", p.local_qkv_weight, local),
        local_qkv_bias_("local_qkv_bias", p.local_qkv_bias, local),
        global_qkv_weight_("global_qkv_weight", p.global_qkv_weight, local),
        global_qkv_bias_("global_qkv_bias", p.global_qkv_bias, local),
        local_proj_weight_("local_proj_weight", p.local_proj_weight, local),
        local_proj_bias_("local_proj_bias", p.local_proj_bias, local),
        global_proj_weight_("global_proj_weight", p.global_proj_weight, local),
        global_proj_bias_("global_proj_bias", p.global_proj_bias, local),
        local_scale_("local_scale", p.local_scale, local),
        local_shift_("local_shift", p.local_shift, local),
        eps_(static_cast<float>(eps)) {
    check_device("global_", global, local, "local");
    if (dropout_p == 0) return;
    check_device("seed", *seed, local, "local");
    seed_ = seed;
    dropout_ = cuda::dropout_of(dropout_p, static_cast<const int64_t*>(seed->const_data_ptr()));
  }

  cuda::CoAttentionInputs view() const {
    return {local_.const_data_ptr(), global_.const_data_ptr(), global_norm_weight_.view(),
        global_norm_bias_.view(), local_qkv_weight_.view(), local_qkv_bias_.view(),
        global_qkv_weight_.view(), global_qkv_bias_.view(), local_proj_weight_.view(),
        local_proj_bias_.view(), global_proj_weight_.view(), global_proj_bias_.view(),
        local_scale_.view(), local_shift_.view(), eps_, dropout_};
  }

 private:
  Tensor local_, global_;
  Values global_norm_weight_, global_norm_bias_, local_qkv_weight_, local_qkv_bias_,
      global_qkv_weight_, global_qkv_bias_, local_proj_weight_, local_proj_bias_,
      global_proj_weight_, global_proj_bias_, local_scale_, local_shift_;
  float eps_;
  OptionalTensor seed_;
  cuda::Dropout dropout_;
};

int form_of(const std::optional<bool>& absorbed) {
  return absorbed.has_value() ? int{*absorbed} : -1;
}

// A gradient or saved tensor as the kernels read it.
Tensor checked(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
    ScalarType dtype, const Tensor& local) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, dtype);
  check_device(name, tensor, local, "local");
  return as_contiguous(tensor);
}

void sum_over_tokens(const cuda::TokenProduct& p, const Tensor& local) {
  const ScalarType dtype = p.is_float32 ? ScalarType::Float : local.scalar_type();
  const auto matrix = [&](const void* data, ScalarType type, std::array<int64_t, 2> sizes,
                          std::array<int64_t, 2> strides) {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, local.device(), type);
  };
  multiply(matrix(p.left, dtype, {p.left_columns, p.rows}, {1, p.left_stride}),
      matrix(p.right, dtype, {p.rows, p.right_columns}, {p.right_stride, 1}),
      matrix(p.out, ScalarType::Float, {p.left_columns, p.right_columns}, {p.out_stride, 1}));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> co_attention(const Tensor& local,
    const Tensor& global, int64_t num_heads, const Tensor& global_norm_weight,
    const Tensor& global_norm_bias, const Tensor& local_qkv_weight, const Tensor& local_qkv_bias,
    const Tensor& global_qkv_weight, const Tensor& global_qkv_bias, const Tensor& local_proj_weight,
    const Tensor& local_proj_bias, const Tensor& global_proj_weight, const Tensor& global_proj_bias,
    const OptionalTensor& local_scale, const OptionalTensor& local_shift, double eps,
    double dropout_p, const OptionalTensor& seed, std::optional<bool> absorbed, bool keep_qkv) {
  const CoAttentionParameters parameters{global_norm_weight, global_norm_bias, local_qkv_weight,
      local_qkv_bias, global_qkv_weight, global_qkv_bias, local_proj_weight, local_proj_bias,
      global_proj_weight, global_proj_bias, local_scale, local_shift};
  const auto shape = check_co_attention<cuda::CoAttentionShape>(
      local, global, num_heads, parameters, dropout_p, seed);
  check(!keep_qkv, "keep_qkv: expected false on a GPU, whose backward projects again");
  const cuda::Storage storage = storage_of(local);
  const int64_t batch = shape.batch;
  const Launch on(local);
  const auto of_floats = [&](const std::vector<int64_t>& sizes) {
    return empty_beside(local, sizes, ScalarType::Float);
  };
  Tensor out_local =
      empty_beside(local, {batch, shape.local_tokens, shape.local_width}, local.scalar_type());
  Tensor out_global =
      empty_beside(local, {batch, shape.global_tokens, shape.global_width}, local.scalar_type());
  Tensor local_softmax = of_floats({batch, num_heads, shape.local_tokens, 2});
  Tensor global_softmax = of_floats({batch, num_heads, shape.global_tokens, 2});
  Tensor attended = of_floats({batch, shape.global_tokens, shape.width});
  // Nothing is kept; results must not share memory, so each is its own.
  Tensor local_qkv = of_floats({0}), global_qkv = of_floats({0});
  if (batch == 0) {
    return {out_local, out_global, local_softmax, global_softmax, attended, local_qkv, global_qkv};
  }

  const Inputs inputs(local, global, parameters, eps, dropout_p, seed);
  cuda::CoAttentionForward args{shape, inputs.view(), out_local.mutable_data_ptr(),
      out_global.mutable_data_ptr(), float_data(local_softmax), float_data(global_softmax),
      float_data(attended), nullptr};
  const cuda::CoAttentionLaunch launch = cuda::co_attention_launch(args, form_of(absorbed));
  const auto bytes = static_cast<int64_t>(cuda::co_attention_workspace(args, storage, launch));
  const Tensor workspace = empty_beside(local, {bytes}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  cuda::co_attention_forward(args, storage, launch, on.stream());
  return {out_local, out_global, local_softmax, global_softmax, attended, local_qkv, global_qkv};
}

std::tuple<Tensor, Tensor, Tensor> co_attention_backward(const Tensor& grad_local,
    const Tensor& grad_global, const Tensor& local, const Tensor& global,
    const Tensor& local_softmax, const Tensor& global_softmax, const Tensor& attended,
    const OptionalTensor& /* local_qkv */, const OptionalTensor& /* global_qkv */,
    int64_t num_heads, const Tensor& global_norm_weight, const Tensor& global_norm_bias,
    const Tensor& local_qkv_weight, const Tensor& local_qkv_bias, const Tensor& global_qkv_weight,
    const Tensor& global_qkv_bias, const Tensor& local_proj_weight, const Tensor& local_proj_bias,
    const Tensor& global_proj_weight, const Tensor& global_proj_bias,
    const OptionalTensor& local_scale, const OptionalTensor& local_shift, double eps,
    double dropout_p, const OptionalTensor& seed, std::optional<bool> absorbed) {
  const CoAttentionParameters parameters{global_norm_weight, global_norm_bias, local_qkv_weight,
      local_qkv_bias, global_qkv_weight, global_qkv_bias, local_proj_weight, local_proj_bias,
      global_proj_weight, global_proj_bias, local_scale, local_shift};
  const auto shape = check_co_attention<cuda::CoAttentionShape>(
      local, global, num_heads, parameters, dropout_p, seed);
  const cuda::Storage storage = storage_of(local);
  const int64_t batch = shape.batch, tokens = shape.local_tokens, width = shape.local_width;
  const int64_t global_tokens = shape.global_tokens, global_width = shape.global_width;
  const ScalarType dtype = local.scalar_type();
  const Tensor upper_local =
      checked("grad_local", grad_local, {batch, tokens, width}, dtype, local);
  const Tensor upper_global =
      checked("grad_global", grad_global, {batch, global_tokens, global_width}, dtype, local);
  check_shape("local_softmax", local_softmax, {batch, num_heads, tokens, 2});
  const Tensor softmax = checked("global_softmax", global_softmax,
      {batch, num_heads, global_tokens, 2}, ScalarType::Float, local);
  const Tensor result =
      checked("attended", attended, {batch, global_tokens, shape.width}, ScalarType::Float, local);
  const Launch on(local);
  Tensor out_local = empty_beside(local, {batch, tokens, width}, dtype);
  Tensor out_global = empty_beside(local, {batch, global_tokens, global_width}, dtype);
  Tensor gradients = empty_beside(local, {cuda::co_attention_parameters(shape)}, ScalarType::Float);
  if (batch == 0) {
    torch::stable::zero_(gradients);
    return {out_local, out_global, gradients};
  }

  const Inputs inputs(local, global, parameters, eps, dropout_p, seed);
  cuda::CoAttentionBackward args{shape, inputs.view(), upper_local.const_data_ptr(),
      upper_global.const_data_ptr(), static_cast<const float*>(softmax.const_data_ptr()),
      static_cast<const float*>(result.const_data_ptr()), out_local.mutable_data_ptr(),
      out_global.mutable_data_ptr(), float_data(gradients), nullptr};
  const cuda::CoAttentionLaunch launch = cuda::co_attention_launch(args, form_of(absorbed));
  const auto bytes = static_cast<int64_t>(cuda::co_attention_workspace(args, storage, launch));
  const Tensor workspace = empty_beside(local, {bytes}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  cuda::co_attention_backward(args, storage, launch, on.stream());
  for (const cuda::TokenProduct& p : cuda::co_attention_products(args, storage, launch)) {
    sum_over_tokens(p, local);
  }
  cuda::co_attention_backward_projections(args, storage, launch, on.stream());
  return {out_local, out_global, gradients};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("co_attention", TORCH_BOX(&dsnet::co_attention));
  m.impl("co_attention_backward", TORCH_BOX(&dsnet::co_attention_backward));
}
