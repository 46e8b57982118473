// Bidirectional co-attention on the CPU: checks, allocation, steps, registration.
#include "cpu/co_attention.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/cpu/workspace.h"
#include "common/absorbs.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

// What both directions hold for their kernels.
class Call {
 public:
  const cpu::CoAttentionShape shape;
  const cpu::CoAttentionLayout layout;
  const int64_t scratch;
  Workspace space;

  Call(const Tensor& local, const Tensor& global, int64_t num_heads,
      const CoAttentionParameters& parameters, double eps, double dropout_p,
      const OptionalTensor& seed, std::optional<bool> absorbed, bool backward)
      : shape(check_co_attention<cpu::CoAttentionShape>(
            local, global, num_heads, parameters, dropout_p, seed)),
        layout(shape,
            absorbed.has_value() ? *absorbed
                                 : absorbs(shape.local_tokens, shape.global_tokens,
                                       shape.local_width, shape.heads),
            backward),
        scratch(cpu::scratch_of(shape, layout, backward)),
        space("local", local),
        local_(as_contiguous(local)),
        global_(as_contiguous(global)),
        eps_(eps),
        dropout_{dropout_p, seed_of(seed)} {
    const auto& p = parameters;
    take("global_norm_weight", p.global_norm_weight, &cpu::CoAttentionCall::norm_weight);
    take("global_norm_bias", p.global_norm_bias, &cpu::CoAttentionCall::norm_bias);
    take("local_qkv_weight", p.local_qkv_weight, &cpu::CoAttentionCall::local_qkv_weight);
    take("local_qkv_bias", p.local_qkv_bias, &cpu::CoAttentionCall::local_qkv_bias);
    take("global_qkv_weight", p.global_qkv_weight, &cpu::CoAttentionCall::global_qkv_weight);
    take("global_qkv_bias", p.global_qkv_bias, &cpu::CoAttentionCall::global_qkv_bias);
    take("local_proj_weight", p.local_proj_weight, &cpu::CoAttentionCall::local_proj_weight);
    take("local_proj_bias", p.local_proj_bias, &cpu::CoAttentionCall::local_proj_bias);
    take("global_proj_weight", p.global_proj_weight, &cpu::CoAttentionCall::global_proj_weight);
    take("global_proj_bias", p.global_proj_bias, &cpu::CoAttentionCall::global_proj_bias);
    take("local_scale", p.local_scale, &cpu::CoAttentionCall::local_scale);
    take("local_shift", p.local_shift, &cpu::CoAttentionCall::local_shift);
  }

  void describe(cpu::CoAttentionCall& args) {
    args = parameters_;
    args.shape = shape;
    args.layout = layout;
    args.local = local_.const_data_ptr();
    args.global = global_.const_data_ptr();
    args.eps = eps_;
    args.dropout = dropout_;
    args.packed = space.held({layout.packed});
    args.met = space.held({shape.batch, shape.heads, layout.met});
  }

  bool is_empty() const { return shape.batch == 0; }

  template <typename Arguments>
  void run(cpu::Step<std::type_identity_t<Arguments>> step, const Arguments& args, int64_t tasks,
      int64_t products) const {
    space.run<Arguments>(step, args, scratch, tasks, products);
  }

  // Products of the steps' tasks, roughly.
  int64_t pack_products() const { return 8 * shape.head_dim * (shape.local_width + shape.global_width); }
  int64_t prologue_products() const {
    return 3 * shape.global_tokens * shape.head_dim * (shape.global_width + shape.local_width);
  }
  int64_t local_products() const {
    const int64_t projections = layout.absorbed ? 0 : 4 * shape.dim() * shape.local_width;
    return layout.chunk_tokens *
           (4 * shape.heads * shape.global_tokens * layout.depth + projections);
  }
  int64_t finish_products() const {
    return layout.finish_block * shape.dim() * (shape.global_width + shape.local_width);
  }

 private:
  void take(const char* name, const OptionalTensor& parameter,
      cpu::Parameter cpu::CoAttentionCall::*to) {
    if (!parameter.has_value()) return;
    held_.push_back(as_contiguous(*parameter));
    parameters_.*to = space.view_of(name, held_.back());
  }

  Tensor local_, global_;
  double eps_;
  cpu::AttentionDropout dropout_;
  cpu::CoAttentionCall parameters_{};
  std::vector<Tensor> held_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> co_attention(const Tensor& local,
    const Tensor& global, int64_t num_heads, const Tensor& global_norm_weight,
    const Tensor& global_norm_bias, const Tensor& local_qkv_weight, const Tensor& local_qkv_bias,
    const Tensor& global_qkv_weight, const Tensor& global_qkv_bias,
    const Tensor& local_proj_weight, const Tensor& local_proj_bias,
    const Tensor& global_proj_weight, const Tensor& global_proj_bias,
    const OptionalTensor& local_scale, const OptionalTensor& local_shift, double eps,
    double dropout_p, const OptionalTensor& seed, std::optional<bool> absorbed) {
  const CoAttentionParameters parameters{global_norm_weight, global_norm_bias, local_qkv_weight,
      local_qkv_bias, global_qkv_weight, global_qkv_bias, local_proj_weight, local_proj_bias,
      global_proj_weight, global_proj_bias, local_scale, local_shift};
  Call call(local, global, num_heads, parameters, eps, dropout_p, seed, absorbed, false);
  const cpu::CoAttentionShape& shape = call.shape;
  const cpu::CoAttentionLayout& layout = call.layout;
  const auto like = [](const Tensor& x) {
    return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  };
  Tensor local_out = like(local), global_out = like(global);
  Tensor local_softmax = call.space.memory({shape.batch, shape.heads, shape.local_tokens, 2});
  Tensor global_softmax = call.space.memory({shape.batch, shape.heads, shape.global_tokens, 2});
  Tensor attended = call.space.memory({shape.batch, shape.global_tokens, shape.dim()});
  if (!call.is_empty()) {
    cpu::CoAttentionForward args{};
    call.describe(args);
    args.local_softmax = local_softmax.mutable_data_ptr();
    args.global_softmax = global_softmax.mutable_data_ptr();
    args.attended = attended.mutable_data_ptr();
    args.partials = call.space.held({shape.batch, layout.chunks, shape.heads, layout.partial});
    args.local_out = local_out.mutable_data_ptr();
    args.global_out = global_out.mutable_data_ptr();
    const auto kernels = cpu::co_attention_forward(cpu::capability(), call.space.storage);
    call.run(kernels.pack, args, shape.heads + 1, call.pack_products());
    call.run(kernels.prologue, args, shape.batch * shape.heads, call.prologue_products());
    call.run(kernels.local, args, shape.batch * layout.chunks, call.local_products());
    call.run(kernels.finish, args, shape.batch * layout.row_blocks, call.finish_products());
  }
  return {local_out, global_out, local_softmax, global_softmax, attended};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("co_attention", TORCH_BOX(&dsnet::co_attention));
}
