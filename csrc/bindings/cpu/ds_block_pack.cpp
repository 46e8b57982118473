// The parameters of a whole block on the CPU, packed once for many calls.
#include <algorithm>
#include <string>
#include <vector>

#include "bindings/cpu/depthwise_coefficients.h"
#include "bindings/cpu/ds_block_layout.h"
#include "cpu/capability.h"

namespace dsnet {
namespace {

using DepthwiseCoefficients = Coefficients<cpu::DepthwiseForward, float>;

// The parameters in the order of ds_block_pack's list.
enum Index : size_t {
  position_weight,
  position_bias,
  split_local_weight,
  split_local_bias,
  split_global_weight,
  split_global_bias,
  local_weight,
  local_bias,
  local_scale,
  local_shift,
  norm_weight,
  norm_bias,
  qkv_weight,
  qkv_bias,
  global_norm_weight,
  global_norm_bias,
  local_qkv_weight,
  local_qkv_bias,
  global_qkv_weight,
  global_qkv_bias,
  local_proj_weight,
  local_proj_bias,
  global_proj_weight,
  global_proj_bias,
  co_scale,
  co_shift,
  fuse_weight,
  fuse_bias,
  fc1_weight,
  fc1_bias,
  fc2_weight,
  fc2_bias,
  parameter_count
};

class Packing {
 public:
  Packing(const Tensor& leader, const BlockShape& shape, const std::vector<Tensor>& parameters)
      : space_("x", leader), shape_(shape), places_(shape) {
    check(parameters.size() == parameter_count, "parameters: expected ", +parameter_count,
        " tensors, got ", parameters.size());
    check_shapes(parameters);
    for (const Tensor& each : parameters) parameters_.push_back(as_contiguous(each));
  }

  Tensor run() {
    packed_ = space_.memory({places_.end});
    // Not every value is written.
    torch::stable::zero_(*packed_);
    depthwise(places_.position, shape_.channels, position_weight, position_bias, {}, {});
    depthwise(places_.local_conv, shape_.local, local_weight, local_bias, local_scale, local_shift);
    weight(places_.split_local, split_local_weight, split_local_bias);
    weight(places_.split_global, split_global_weight, split_global_bias);
    attention();
    co_attention();
    fuse();
    weight(places_.fc1, fc1_weight, fc1_bias);
    weight(places_.fc2, fc2_weight, fc2_bias);
    return *packed_;
  }

 private:
  void check_shapes(const std::vector<Tensor>& parameters) const {
    const BlockShape& s = shape_;
    const int64_t C = s.channels, Cl = s.local, Cg = s.global, R = s.hidden;
    const std::initializer_list<int64_t> expected[parameter_count] = {{C, 1, 3, 3}, {C},
        {Cl, C, 1, 1}, {Cl}, {Cg, C, 1, 1}, {Cg}, {Cl, 1, 3, 3}, {Cl}, {Cl}, {Cl}, {Cg}, {Cg},
        {3 * Cg, Cg}, {3 * Cg}, {Cg}, {Cg}, {3 * s.dim, Cl}, {3 * s.dim}, {3 * s.dim, Cg},
        {3 * s.dim}, {Cl, s.dim}, {Cl}, {Cg, s.dim}, {Cg}, {Cl}, {Cl}, {C, C}, {C}, {R, C}, {R},
        {C, R}, {C}};
    for (size_t i = 0; i < parameter_count; ++i) {
      check_shape(("parameters[" + std::to_string(i) + "]").c_str(), parameters[i], expected[i]);
    }
  }

  void* at(int64_t place) const { return static_cast<float*>(packed_->mutable_data_ptr()) + place; }
  cpu::Parameter view(Index index) const {
    return space_.view_of("parameters", parameters_[index]);
  }

  void depthwise(int64_t place, int64_t channels, Index weight, Index bias,
      std::optional<Index> scale, std::optional<Index> shift) const {
    const auto optional = [&](const std::optional<Index>& index) {
      return index.has_value() ? OptionalTensor(parameters_[*index]) : std::nullopt;
    };
    const DepthwiseCoefficients rows = forward_coefficients<float>(shape_.depthwise(1, channels),
        parameters_[weight], parameters_[bias], optional(scale), optional(shift));
    const int64_t count = cpu::DepthwiseForward::coefficient_rows * cpu::padded(channels);
    std::copy(rows.data(), rows.data() + count, static_cast<float*>(at(place)));
  }

  void weight(int64_t place, Index weight, Index bias) const {
    const int64_t outputs = parameters_[weight].size(0), depth = parameters_[weight].size(1);
    const PackedWeight to(at(place), space_.item(), outputs);
    const cpu::WeightPacking args{
        view(weight), view(bias), outputs, depth, 0, depth, to.panels, to.bias_row};
    const auto kernels = cpu::patch_conv(cpu::capability(), space_.storage);
    space_.run(kernels.pack, args, args.scratch(), args.tasks(), 4 * cpu::lanes * depth);
  }

  void attention() const {
    const cpu::AttentionShape shape = shape_.attention(1);
    cpu::AttentionForward args{};
    args.shape = shape;
    args.norm_weight = view(norm_weight);
    args.norm_bias = view(norm_bias);
    args.qkv_weight = view(qkv_weight);
    args.qkv_bias = view(qkv_bias);
    args.packed = at(places_.attention);
    const auto kernels = cpu::global_attention_forward(cpu::capability(), space_.storage);
    space_.run(kernels.pack, args, cpu::AttentionLayout(shape).scratch(shape), shape.heads + 1,
        12 * shape.width());
  }

  void co_attention() const {
    cpu::CoAttentionForward args{};
    args.shape = shape_.co_attention(1);
    args.layout = shape_.co_attention_layout(1);
    cpu::Parameter* const to[] = {&args.norm_weight, &args.norm_bias, &args.local_qkv_weight,
        &args.local_qkv_bias, &args.global_qkv_weight, &args.global_qkv_bias,
        &args.local_proj_weight, &args.local_proj_bias, &args.global_proj_weight,
        &args.global_proj_bias, &args.local_scale, &args.local_shift};
    size_t index = global_norm_weight;
    for (cpu::Parameter* each : to) *each = view(static_cast<Index>(index++));
    args.packed = at(places_.co_attention);
    const auto kernels = cpu::co_attention_forward(cpu::capability(), space_.storage);
    space_.run<cpu::CoAttentionForward>(kernels.pack, args,
        cpu::scratch_of(args.shape, args.layout, false), args.shape.heads + 1,
        args.layout.pack_products(args.shape));
  }

  void fuse() const {
    cpu::UpsampleForward args{};
    args.shape = shape_.upsample(1);
    args.weight = view(fuse_weight);
    args.bias = view(fuse_bias);
    args.packed_local = at(places_.fuse_local);
    args.packed_global = at(places_.fuse_global);
    args.bias_row = at(places_.fuse_bias);
    const cpu::UpsampleLayout layout(args.shape);
    const auto kernels = cpu::upsample_concat_forward(cpu::capability(), space_.storage);
    space_.run(kernels.pack, args, layout.scratch(args.shape), layout.packs, 4 * shape_.channels);
  }

  Workspace space_;
  const BlockShape shape_;
  const BlockPlaces places_;
  std::vector<Tensor> parameters_;
  OptionalTensor packed_;
};

}  // namespace

Tensor ds_block_pack(
    const Tensor& x, const std::vector<Tensor>& parameters, const std::vector<int64_t>& sizes) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  check_block_dtype(x);
  return Packing(x, BlockShape(x.size(2), x.size(3), sizes), parameters).run();
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("ds_block_pack", TORCH_BOX(&dsnet::ds_block_pack));
}
