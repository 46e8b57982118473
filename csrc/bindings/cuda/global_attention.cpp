// Self-attention among the global tokens on NVIDIA GPUs: checks, allocation, dense products of the
// backward, registration.
#include "cuda/global_attention.h"

#include "bindings/cuda/dense.h"

namespace dsnet {
namespace {

// Everything that both directions read, alive as long as this is.
class Inputs {
 public:
  Inputs(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
      const Tensor& qkv_weight, const Tensor& qkv_bias, double eps, double dropout_p,
      const OptionalTensor& seed)
      : x_(as_contiguous(x)),
        norm_weight_("norm_weight", norm_weight, x),
        norm_bias_("norm_bias", norm_bias, x),
        qkv_weight_(with_dtype_of(x, "qkv_weight", qkv_weight)),
        qkv_bias_("qkv_bias", qkv_bias, x),
        eps_(static_cast<float>(eps)) {
    if (dropout_p == 0) return;
    check_device("seed", *seed, x);
    seed_ = seed;
    dropout_ = cuda::dropout_of(dropout_p, static_cast<const int64_t*>(seed->const_data_ptr()));
  }

  // (3·C, C) in x's dtype.
  const Tensor& qkv_weight() const { return qkv_weight_; }
  cuda::AttentionInputs view() const {
    return {x_.const_data_ptr(), norm_weight_.view(), norm_bias_.view(),
        qkv_weight_.const_data_ptr(), qkv_bias_.view(), eps_, dropout_};
  }

 private:
  Tensor x_;
  Values norm_weight_, norm_bias_;
  Tensor qkv_weight_;
  Values qkv_bias_;
  float eps_;
  OptionalTensor seed_;
  cuda::Dropout dropout_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> global_attention(const Tensor& x, int64_t num_heads,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv_weight,
    const Tensor& qkv_bias, double eps, double dropout_p, const OptionalTensor& seed,
    bool keep_qkv) {
  const auto shape = check_attention<cuda::AttentionShape>(
      x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, dropout_p, seed);
  const cuda::Storage storage = storage_of(x);
  const int64_t batch = shape.batch, tokens = shape.tokens, width = shape.width;
  check(!keep_qkv, "keep_qkv: expected false on a GPU, whose backward projects again");
  const Launch on(x);
  Tensor out = empty_beside(x, {batch, tokens, width}, x.scalar_type());
  Tensor lse = empty_beside(x, {batch, num_heads, tokens}, ScalarType::Float);
  Tensor kept = empty_beside(x, {0}, ScalarType::Float);
  if (batch * tokens == 0) return {out, lse, kept};

  const Inputs inputs(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, seed);
  cuda::AttentionForward args{
      shape, inputs.view(), out.mutable_data_ptr(), float_data(lse), nullptr};
  const cuda::AttentionLaunch launch = cuda::attention_launch(args);
  OptionalTensor qkv;
  if (!launch.fused) {
    qkv = empty_beside(x, {batch, tokens, 3 * width}, x.scalar_type());
    args.qkv = qkv->mutable_data_ptr();
  }
  cuda::attention_forward(args, storage, launch, on.stream());
  return {out, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_attention_backward(const Tensor& grad,
    const Tensor& x, const Tensor& lse, const OptionalTensor& /* qkv */, int64_t num_heads,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv_weight,
    const Tensor& qkv_bias, double eps, double dropout_p, const OptionalTensor& seed) {
  const auto shape = check_attention<cuda::AttentionShape>(
      x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, dropout_p, seed);
  const cuda::Storage storage = storage_of(x);
  const int64_t batch = shape.batch, tokens = shape.tokens, width = shape.width;
  check_shape("grad", grad, {batch, tokens, width});
  check_dtype("grad", grad, x.scalar_type());
  check_device("grad", grad, x);
  check_shape("lse", lse, {batch, num_heads, tokens});
  check_dtype("lse", lse, ScalarType::Float);
  check_device("lse", lse, x);
  const Launch on(x);
  const int64_t rows = batch * tokens;
  const auto floats = [&](const std::vector<int64_t>& sizes) {
    return empty_beside(x, sizes, ScalarType::Float);
  };
  const auto values = [&](const std::vector<int64_t>& sizes) {
    return empty_beside(x, sizes, x.scalar_type());
  };
  Tensor grad_x = values({batch, tokens, width});
  Tensor grad_norm_weight = floats({width}), grad_norm_bias = floats({width});
  Tensor grad_qkv_bias = floats({3 * width});
  Tensor grad_qkv_weight = floats({3 * width, width});
  if (rows == 0) {
    for (Tensor* sum : {&grad_norm_weight, &grad_norm_bias, &grad_qkv_weight, &grad_qkv_bias}) {
      torch::stable::zero_(*sum);
    }
    return {grad_x, grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_qkv_bias};
  }

  const Inputs inputs(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, seed);
  const Tensor grad_source = as_contiguous(grad);
  const Tensor lse_source = as_contiguous(lse);
  const Tensor qkv = values({rows, 3 * width}), grad_qkv = values({rows, 3 * width});
  const Tensor normalized = values({rows, width});
  const Tensor statistics = floats({rows, 2}), row_sums = floats({2, batch, num_heads, tokens});
  cuda::AttentionBackward args{};
  args.shape = shape;
  args.inputs = inputs.view();
  args.grad = grad_source.const_data_ptr();
  args.lse = static_cast<const float*>(lse_source.const_data_ptr());
  args.qkv = qkv.mutable_data_ptr();
  args.normalized = normalized.mutable_data_ptr();
  args.statistics = float_data(statistics);
  args.row_sums = float_data(row_sums);
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_norm_weight = float_data(grad_norm_weight);
  args.grad_norm_bias = float_data(grad_norm_bias);
  args.grad_qkv_bias = float_data(grad_qkv_bias);
  const cuda::AttentionLaunch launch = cuda::attention_launch(args);
  const Tensor partials = floats({launch.slots, 3 * width});
  args.partials = float_data(partials);
  cuda::attention_backward_scores(args, storage, launch, on.stream());

  const Tensor grad_normalized = values({rows, width});
  multiply(grad_qkv, inputs.qkv_weight(), grad_normalized);
  args.grad_normalized = grad_normalized.const_data_ptr();
  cuda::attention_backward_norm(args, storage, launch, on.stream());
  multiply(torch::stable::transpose(grad_qkv, 0, 1), normalized, grad_qkv_weight);
  return {grad_x, grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_qkv_bias};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CUDA, m) {
  m.impl("global_attention", TORCH_BOX(&dsnet::global_attention));
  m.impl("global_attention_backward", TORCH_BOX(&dsnet::global_attention_backward));
}
