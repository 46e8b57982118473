// Bidirectional co-attention on the CPU: checks, allocation, steps, registration.
#include "cpu/co_attention.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <tuple>
#include <vector>

#include "bindings/cpu/forward_steps.h"
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
            absorbed.has_value()
                ? *absorbed
                : absorbs(shape.local_tokens, shape.global_tokens, shape.local_width, shape.heads),
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

 private:
  void take(const char* name, const OptionalTensor& parameter,
      cpu::Parameter cpu::CoAttentionCall::* to) {
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
  Tensor local_qkv = call.space.memory({keep_qkv ? layout.kept_local : 0});
  Tensor global_qkv = call.space.memory({keep_qkv ? layout.kept_global : 0});
  if (!call.is_empty()) {
    cpu::CoAttentionForward args{};
    call.describe(args);
    args.local_softmax = local_softmax.mutable_data_ptr();
    args.global_softmax = global_softmax.mutable_data_ptr();
    args.attended = attended.mutable_data_ptr();
    if (keep_qkv) {
      args.local_qkv = local_qkv.mutable_data_ptr();
      args.global_qkv = global_qkv.mutable_data_ptr();
    }
    args.local_out = local_out.mutable_data_ptr();
    args.global_out = global_out.mutable_data_ptr();
    const auto kernels = cpu::co_attention_forward(cpu::capability(), call.space.storage);
    call.run(kernels.pack, args, shape.heads + 1, layout.pack_products(shape));
    run_co_attention(call.space, kernels, args);
  }
  return {local_out, global_out, local_softmax, global_softmax, attended, local_qkv, global_qkv};
}

namespace {

// Where the gradients of parameters lie in their row; see _parameter_shapes in co_attention.py.
struct Places {
  int64_t norm_weight, norm_bias, local_qkv, local_qkv_bias, global_qkv, global_qkv_bias;
  int64_t local_proj, local_proj_bias, global_proj, global_proj_bias, scale, shift, end;

  explicit Places(const cpu::CoAttentionShape& s) {
    const int64_t sizes[] = {s.global_width, s.global_width, 3 * s.dim() * s.local_width,
        3 * s.dim(), 3 * s.dim() * s.global_width, 3 * s.dim(), s.local_width * s.dim(),
        s.local_width, s.global_width * s.dim(), s.global_width, s.local_width, s.local_width};
    int64_t* const places[] = {&norm_weight, &norm_bias, &local_qkv, &local_qkv_bias, &global_qkv,
        &global_qkv_bias, &local_proj, &local_proj_bias, &global_proj, &global_proj_bias, &scale,
        &shift};
    end = 0;
    for (size_t i = 0; i < std::size(sizes); ++i) {
      *places[i] = end;
      end += sizes[i];
    }
  }
};

// The sums over tokens that gradients of weights are.
template <typename Acc>
std::vector<cpu::TokenProduct> products_of(const cpu::CoAttentionBackward& args, Acc* out) {
  const cpu::CoAttentionShape& s = args.shape;
  const cpu::CoAttentionLayout& layout = args.layout;
  const Places at(s);
  const int64_t dim = s.dim(), d = s.head_dim, Cl = s.local_width, Cg = s.global_width;
  const int64_t M = s.batch * s.global_tokens, N = s.batch * s.local_tokens;
  const auto values = [](const void* data) { return static_cast<const Acc*>(data); };
  std::vector<cpu::TokenProduct> products;
  products.push_back({.left = args.grad_global_qkv,
      .right = args.y,
      .out = out + at.global_qkv,
      .sums = out + at.global_qkv_bias,
      .weights = nullptr,
      .tokens = M,
      .rows = 3 * dim,
      .columns = Cg,
      .left_stride = 3 * dim,
      .right_stride = layout.global,
      .out_stride = Cg});
  products.push_back({.left = args.grad_global,
      .right = args.attended_copy,
      .out = out + at.global_proj,
      .sums = out + at.global_proj_bias,
      .weights = nullptr,
      .tokens = M,
      .rows = Cg,
      .columns = dim,
      .left_stride = Cg,
      .right_stride = dim,
      .out_stride = dim,
      .left_is_stored = true});
  if (!layout.absorbed) {
    products.push_back({.left = args.grad_local_qkv,
        .right = args.tokens,
        .out = out + at.local_qkv,
        .sums = out + at.local_qkv_bias,
        .weights = nullptr,
        .tokens = N,
        .rows = 3 * dim,
        .columns = Cl,
        .left_stride = 3 * dim,
        .right_stride = layout.local,
        .out_stride = Cl});
    products.push_back({.left = args.grad_local,
        .right = args.heads_out,
        .out = out + at.local_proj,
        .sums = nullptr,
        .weights = nullptr,
        .tokens = N,
        .rows = Cl,
        .columns = dim,
        .left_stride = Cl,
        .right_stride = dim,
        .out_stride = dim,
        .left_is_stored = true});
    return products;
  }
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  for (int64_t h = 0; h < s.heads; ++h) {
    const auto sums = [&](int64_t part) {
      return values(args.sums) + (part * s.heads + h) * M * layout.inner;
    };
    const Acc* global_qkv = values(args.global_qkv) + h * d;
    const Acc* lefts[] = {global_qkv + dim, global_qkv, values(args.grad_attended) + h * d};
    for (int64_t part = 0; part < 3; ++part) {
      const int64_t row = part * dim + h * d;
      products.push_back({.left = lefts[part],
          .right = sums(part),
          .out = out + at.local_qkv + row * Cl,
          .sums = out + at.local_qkv_bias + row,
          .weights = values(args.row_sums) + (part * s.heads + h) * M,
          .tokens = M,
          .rows = d,
          .columns = Cl,
          .left_stride = part == 2 ? dim : 3 * dim,
          .right_stride = layout.inner,
          .out_stride = Cl,
          .factor = part == 2 ? 1 : scale});
    }
    products.push_back({.left = sums(3),
        .right = global_qkv + 2 * dim,
        .out = out + at.local_proj + h * d,
        .sums = nullptr,
        .weights = nullptr,
        .tokens = M,
        .rows = Cl,
        .columns = d,
        .left_stride = layout.inner,
        .right_stride = 3 * dim,
        .out_stride = dim});
  }
  return products;
}

template <typename Acc>
void gradients_of_weights(const Call& call, cpu::CoAttentionBackward& args,
    cpu::CoAttentionBackwardKernels kernels, Acc* out) {
  const cpu::CoAttentionShape& shape = call.shape;
  const cpu::CoAttentionLayout& layout = call.layout;
  const Places at(shape);
  const int64_t Cl = shape.local_width, Cg = shape.global_width;
  const std::vector<cpu::TokenProduct> products = products_of(args, out);
  args.products = products.data();
  int64_t work = 0;
  for (const cpu::TokenProduct& product : products) {
    args.tasks += product.tasks();
    work += product.rows * product.columns * product.tokens;
  }
  // About the golden section, which spreads any number of neighbours evenly.
  args.task_step = args.tasks * 5 / 8 + 1;
  while (std::gcd(args.task_step, args.tasks) > 1) ++args.task_step;
  call.run(kernels.weights, args, args.tasks, work / args.tasks);
  // The key bias adds the same to all of a query's logits: no gradient, but NaN stays.
  for (int64_t i = 0; i < shape.dim(); ++i) out[at.local_qkv_bias + shape.dim() + i] *= Acc{0};
  const int64_t chunks = shape.batch * layout.chunks;
  const auto* channels = static_cast<const Acc*>(args.channel_partials);
  const int64_t places[] = {at.scale, at.shift, at.local_proj_bias};
  for (int64_t part = 0; part < 3; ++part) {
    sum_blocks(channels + part * layout.local, chunks, 3 * layout.local, Cl, out + places[part]);
  }
  const auto* norm = static_cast<const Acc*>(args.norm_partials);
  const int64_t blocks = shape.batch * layout.row_blocks;
  sum_blocks(norm, blocks, 2 * layout.global, Cg, out + at.norm_weight);
  sum_blocks(norm + layout.global, blocks, 2 * layout.global, Cg, out + at.norm_bias);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> co_attention_backward(const Tensor& grad_local,
    const Tensor& grad_global, const Tensor& local, const Tensor& global,
    const Tensor& local_softmax, const Tensor& global_softmax, const Tensor& attended,
    const OptionalTensor& local_qkv, const OptionalTensor& global_qkv, int64_t num_heads,
    const Tensor& global_norm_weight, const Tensor& global_norm_bias,
    const Tensor& local_qkv_weight, const Tensor& local_qkv_bias, const Tensor& global_qkv_weight,
    const Tensor& global_qkv_bias, const Tensor& local_proj_weight, const Tensor& local_proj_bias,
    const Tensor& global_proj_weight, const Tensor& global_proj_bias,
    const OptionalTensor& local_scale, const OptionalTensor& local_shift, double eps,
    double dropout_p, const OptionalTensor& seed, std::optional<bool> absorbed) {
  const CoAttentionParameters parameters{global_norm_weight, global_norm_bias, local_qkv_weight,
      local_qkv_bias, global_qkv_weight, global_qkv_bias, local_proj_weight, local_proj_bias,
      global_proj_weight, global_proj_bias, local_scale, local_shift};
  Call call(local, global, num_heads, parameters, eps, dropout_p, seed, absorbed, true);
  const cpu::CoAttentionShape& shape = call.shape;
  const cpu::CoAttentionLayout& layout = call.layout;
  const int64_t B = shape.batch, N = shape.local_tokens, M = shape.global_tokens;
  const int64_t h = shape.heads, dim = shape.dim();
  check_shape("grad_local", grad_local, {B, N, shape.local_width});
  check_shape("grad_global", grad_global, {B, M, shape.global_width});
  check_same_dtype("grad_local", grad_local, "local", local);
  check_same_dtype("grad_global", grad_global, "local", local);
  check_shape("local_softmax", local_softmax, {B, h, N, 2});
  check_shape("global_softmax", global_softmax, {B, h, M, 2});
  check_shape("attended", attended, {B, M, dim});
  check(local_qkv.has_value(), "local_qkv: expected what the forward kept, got none");
  check(global_qkv.has_value(), "global_qkv: expected what the forward kept, got none");
  check_shape("local_qkv", *local_qkv, {layout.kept_local});
  check_shape("global_qkv", *global_qkv, {layout.kept_global});
  call.space.check_accumulators("local_softmax", local_softmax);
  call.space.check_accumulators("global_softmax", global_softmax);
  call.space.check_accumulators("attended", attended);
  call.space.check_accumulators("local_qkv", *local_qkv);
  call.space.check_accumulators("global_qkv", *global_qkv);
  const auto like = [](const Tensor& x) {
    return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  };
  Tensor grad_local_in = like(local), grad_global_in = like(global);
  Tensor grad_parameters = call.space.memory({Places(shape).end});
  if (call.is_empty()) {
    torch::stable::zero_(grad_parameters);
    return {grad_local_in, grad_global_in, grad_parameters};
  }

  const Tensor held[] = {as_contiguous(grad_local), as_contiguous(grad_global),
      as_contiguous(local_softmax), as_contiguous(global_softmax), as_contiguous(attended),
      as_contiguous(*local_qkv), as_contiguous(*global_qkv)};
  cpu::CoAttentionBackward args{};
  call.describe(args);
  Workspace& space = call.space;
  args.grad_local = held[0].const_data_ptr();
  args.grad_global = held[1].const_data_ptr();
  // The backward only reads them.
  args.local_softmax = const_cast<void*>(held[2].const_data_ptr());
  args.global_softmax = const_cast<void*>(held[3].const_data_ptr());
  args.attended = const_cast<void*>(held[4].const_data_ptr());
  args.local_qkv = const_cast<void*>(held[5].const_data_ptr());
  args.global_qkv = const_cast<void*>(held[6].const_data_ptr());
  args.y = space.held({B, M, layout.global});
  args.moments = space.held({B, M, 2});
  args.grad_attended = space.held({B * M * dim + cpu::lanes});
  args.attended_copy = space.held({B * M * dim + cpu::lanes});
  args.deltas = space.held({B, h, layout.rows});
  args.partials = space.held({B, layout.chunks, h, layout.grad_partial});
  args.row_sums = space.held({3, h, B * M});
  args.grad_global_qkv = space.held({B, M, 3 * dim});
  args.channel_partials = space.held({B, layout.chunks, 3, layout.local});
  args.norm_partials = space.held({B, layout.row_blocks, 2, layout.global});
  if (layout.absorbed) {
    args.sums = space.held({4, h, B * M, layout.inner});
  } else {
    args.tokens = space.held({B, N, layout.local});
    args.grad_local_qkv = space.held({B, N, 3 * dim});
    args.heads_out = space.held({B * N * dim + cpu::lanes});
  }
  args.grad_local_in = grad_local_in.mutable_data_ptr();
  args.grad_global_in = grad_global_in.mutable_data_ptr();

  const auto kernels = cpu::co_attention_backward(cpu::capability(), space.storage);
  call.run(kernels.pack, args, h + 1, 2 * layout.pack_products(shape));
  call.run(kernels.prologue, args, B * h, 2 * layout.prologue_products(shape));
  call.run(kernels.local, args, B * layout.chunks, 3 * layout.local_products(shape));
  call.run(kernels.heads, args, B * h, 3 * M * shape.head_dim * shape.local_width);
  call.run(kernels.finish, args, B * layout.row_blocks, 3 * layout.finish_products(shape));
  with_accumulator(space.storage, [&](auto value) {
    using Acc = decltype(value);
    gradients_of_weights(
        call, args, kernels, static_cast<Acc*>(grad_parameters.mutable_data_ptr()));
  });
  return {grad_local_in, grad_global_in, grad_parameters};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("co_attention", TORCH_BOX(&dsnet::co_attention));
  m.impl("co_attention_backward", TORCH_BOX(&dsnet::co_attention_backward));
}
