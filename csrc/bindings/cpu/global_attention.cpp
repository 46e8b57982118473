// Global self-attention on the CPU: checks, allocation, threads, registration.
#include "cpu/global_attention.h"

#include <tuple>

#include "bindings/cpu/forward_steps.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

// What both directions hold for their kernels.
class Call : public Workspace {
 public:
  const cpu::AttentionShape shape;
  const cpu::AttentionLayout layout;

  Call(const Tensor& x, int64_t num_heads, const Tensor& norm_weight, const Tensor& norm_bias,
      const Tensor& qkv_weight, const Tensor& qkv_bias, double eps, double dropout_p,
      const OptionalTensor& seed)
      : Workspace("x", x),
        shape(check_attention<cpu::AttentionShape>(
            x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, dropout_p, seed)),
        layout(shape),
        x_(as_contiguous(x)),
        norm_weight_(as_contiguous(norm_weight)),
        norm_bias_(as_contiguous(norm_bias)),
        qkv_weight_(as_contiguous(qkv_weight)),
        qkv_bias_(as_contiguous(qkv_bias)),
        eps_(eps),
        dropout_{dropout_p, seed_of(seed)} {}

  void describe(cpu::AttentionCall& args) {
    args.shape = shape;
    args.x = x_.const_data_ptr();
    args.norm_weight = view_of("norm_weight", norm_weight_);
    args.norm_bias = view_of("norm_bias", norm_bias_);
    args.qkv_weight = view_of("qkv_weight", qkv_weight_);
    args.eps = eps_;
    args.dropout = dropout_;
  }
  cpu::Parameter qkv_bias() const { return view_of("qkv_bias", qkv_bias_); }
  int64_t kept_size() const { return shape.batch * shape.heads * shape.tokens * layout.head; }

  // Products of a token's projection to one head.
  int64_t head_products() const { return 3 * shape.head_dim * shape.width(); }

 private:
  Tensor x_, norm_weight_, norm_bias_, qkv_weight_, qkv_bias_;
  double eps_;
  cpu::AttentionDropout dropout_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> global_attention(const Tensor& x, int64_t num_heads,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv_weight,
    const Tensor& qkv_bias, double eps, double dropout_p, const OptionalTensor& seed,
    bool keep_qkv) {
  Call call(x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, seed);
  const cpu::AttentionShape& shape = call.shape;
  const cpu::AttentionLayout& layout = call.layout;
  Tensor out = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  Tensor lse = call.memory({shape.batch, num_heads, shape.tokens});
  Tensor qkv = call.memory({keep_qkv ? call.kept_size() : 0});
  if (x.numel() == 0) return {out, lse, qkv};

  cpu::AttentionForward args{};
  call.describe(args);
  args.qkv_bias = call.qkv_bias();
  args.packed = call.held({layout.packed});
  args.kept = keep_qkv ? qkv.mutable_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  const auto kernels = cpu::global_attention_forward(cpu::capability(), call.storage);
  call.run(kernels.pack, args, layout.scratch(shape), num_heads + 1, 4 * call.head_products());
  run_attention(call, kernels, args, layout);
  return {out, lse, qkv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_attention_backward(const Tensor& grad,
    const Tensor& x, const Tensor& lse, const OptionalTensor& qkv, int64_t num_heads,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv_weight,
    const Tensor& qkv_bias, double eps, double dropout_p, const OptionalTensor& seed) {
  Call call(x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, seed);
  const cpu::AttentionShape& shape = call.shape;
  const cpu::AttentionLayout& layout = call.layout;
  const int64_t M = shape.tokens, C = shape.width(), d = shape.head_dim;
  const int64_t all_heads = shape.batch * num_heads, all_tokens = shape.batch * M;
  check_shape("grad", grad, {shape.batch, M, C});
  check(grad.scalar_type() == x.scalar_type(), "grad: expected x's dtype, ",
      torch::headeronly::toString(x.scalar_type()), ", got ",
      torch::headeronly::toString(grad.scalar_type()));
  check_shape("lse", lse, {shape.batch, num_heads, M});
  call.check_accumulators("lse", lse);
  check(qkv.has_value(), "qkv: expected what the forward kept, got none");
  check_shape("qkv", *qkv, {call.kept_size()});
  call.check_accumulators("qkv", *qkv);
  Tensor grad_x = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  Tensor grad_norm_weight = call.memory({C}), grad_norm_bias = call.memory({C});
  Tensor grad_qkv_weight = call.memory({3 * C, C}), grad_qkv_bias = call.memory({3 * C});
  if (x.numel() == 0) {
    for (Tensor* each : {&grad_norm_weight, &grad_norm_bias, &grad_qkv_weight, &grad_qkv_bias}) {
      torch::stable::zero_(*each);
    }
    return {grad_x, grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_qkv_bias};
  }

  const Tensor grad_source = as_contiguous(grad), lse_source = as_contiguous(lse);
  const Tensor qkv_source = as_contiguous(*qkv);
  const cpu::AttentionBackwardLayout cut(shape, layout);
  cpu::AttentionBackward args{};
  call.describe(args);
  args.cut = cut;
  args.grad = grad_source.const_data_ptr();
  args.lse = lse_source.const_data_ptr();
  args.qkv = qkv_source.const_data_ptr();
  args.packed = call.held({2 * layout.width});
  args.y = call.held({all_tokens, layout.width});
  args.moments = call.held({all_tokens, 2});
  args.packed_rows = call.held({3 * C, layout.width});
  args.grad_qkv = call.held({all_tokens, 3 * C});
  args.norm_partials = call.held({cut.token_blocks, 2, layout.width});
  if (cut.splits > 1) args.partials = call.held({all_heads, cut.splits, 2, M, d});
  if (!layout.is_few) {
    args.keys = call.held({all_heads, d, layout.keys});
    args.values = call.held({all_heads, d, layout.keys});
  }
  args.grad_x = grad_x.mutable_data_ptr();

  const auto kernels = cpu::global_attention_backward(cpu::capability(), call.storage);
  const int64_t size = cut.scratch(shape, layout);
  call.run(kernels.pack, args, size, cut.panels + 1, 12 * C * cut.panel);
  call.run(kernels.normalise, args, size, shape.batch * layout.token_blocks,
      16 * C * cpu::AttentionLayout::token_block);
  call.run(kernels.heads, args, size, all_heads * cut.splits, 5 * M * M * d / cut.splits);
  call.run(kernels.tokens, args, size, cut.token_blocks, cut.token_block * 3 * C * C);
  const cpu::TokenProduct weights{.left = args.grad_qkv,
      .right = args.y,
      .out = grad_qkv_weight.mutable_data_ptr(),
      .sums = grad_qkv_bias.mutable_data_ptr(),
      .weights = nullptr,
      .tokens = all_tokens,
      .rows = 3 * C,
      .columns = C,
      .left_stride = 3 * C,
      .right_stride = layout.width,
      .out_stride = C};
  call.run(kernels.weights, weights, cpu::TokenProduct::scratch(C), weights.tasks(),
      cpu::TokenProduct::row_block * C * all_tokens);
  with_accumulator(call.storage, [&](auto value) {
    using Acc = decltype(value);
    const auto* norm = static_cast<const Acc*>(args.norm_partials);
    const int64_t blocks = cut.token_blocks, stride = 2 * layout.width;
    sum_blocks(norm, blocks, stride, C, static_cast<Acc*>(grad_norm_weight.mutable_data_ptr()));
    sum_blocks(norm + layout.width, blocks, stride, C,
        static_cast<Acc*>(grad_norm_bias.mutable_data_ptr()));
  });
  return {grad_x, grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_qkv_bias};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("global_attention", TORCH_BOX(&dsnet::global_attention));
  m.impl("global_attention_backward", TORCH_BOX(&dsnet::global_attention_backward));
}
