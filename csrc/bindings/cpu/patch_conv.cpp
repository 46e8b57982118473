// Convolutions of patches on the CPU: checks, allocation, threads, registration.
#include "cpu/patch_conv.h"

#include "bindings/cpu/forward_steps.h"
#include "bindings/cpu/packed_weight.h"
#include "cpu/capability.h"

namespace dsnet {

Tensor patch_conv_pack(const Tensor& weight, const OptionalTensor& bias) {
  check(weight.dim() == 2, "weight: expected shape (O, K), got ", shape_text(weight.sizes()));
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  check(outputs > 0 && depth > 0, "weight: expected at least one row and column, got ",
      shape_text(weight.sizes()));
  check_shape("bias", bias, {outputs});
  Workspace space("weight", weight);
  Tensor packed = space.memory({PackedWeight::size(outputs, depth)});
  // Not every value is written.
  torch::stable::zero_(packed);
  const Tensor source = as_contiguous(weight);
  const OptionalTensor bias_source = contiguous_of(bias);
  const PackedWeight place(packed.mutable_data_ptr(), space.item(), outputs);
  const cpu::WeightPacking args{space.view_of("weight", source),
      optional_view_of(space, "bias", bias_source), outputs, depth, 0, depth, place.panels,
      place.bias_row};
  const auto kernels = cpu::patch_conv(cpu::capability(), space.storage);
  space.run(kernels.pack, args, args.scratch(), args.tasks(), 4 * cpu::lanes * depth);
  return packed;
}

Tensor patch_conv(const Tensor& x, const Tensor& packed, int64_t outputs, int64_t patch) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  check(outputs > 0, "outputs: expected at least 1, got ", outputs);
  check(patch > 0 && x.size(2) >= patch && x.size(3) >= patch, "patch: expected a side within x's ",
      shape_text(x.sizes()), ", got ", patch);
  cpu::PatchConv args{};
  args.shape = {x.size(0), x.size(2) / patch, x.size(3) / patch, x.size(1), patch, outputs};
  const int64_t depth = args.shape.depth();
  check(depth > 0, "x: expected at least one channel, got ", shape_text(x.sizes()));
  Workspace space("x", x);
  check(packed.scalar_type() == space.accumulator(), "packed: expected ",
      torch::headeronly::toString(space.accumulator()), ", got ",
      torch::headeronly::toString(packed.scalar_type()));
  check_shape("packed", packed, {PackedWeight::size(outputs, depth)});
  check(packed.is_contiguous(), "packed: expected what patch_conv_pack returns, got a slice");
  Tensor out = torch::stable::empty({x.size(0), outputs, args.shape.height, args.shape.width},
      x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  const PackedWeight place(packed.mutable_data_ptr(), space.item(), outputs);
  args.x = pixels_of<cpu::Pixels>(x);
  args.stride_channel = x.stride(1);
  args.packed = place.panels;
  args.bias_row = place.bias_row;
  args.out = out.mutable_data_ptr();
  run_patch_conv(space, cpu::patch_conv(cpu::capability(), space.storage), args);
  return out;
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("patch_conv_pack", TORCH_BOX(&dsnet::patch_conv_pack));
  m.impl("patch_conv", TORCH_BOX(&dsnet::patch_conv));
}
