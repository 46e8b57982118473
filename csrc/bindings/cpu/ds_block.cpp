// A whole block in inference on the CPU: the kernels of its operations, one after the other, on as
// many images as stay in the cache, with parameters packed once.
#include <algorithm>
#include <vector>

#include "bindings/cpu/depthwise_coefficients.h"
#include "bindings/cpu/forward_steps.h"
#include "bindings/cpu/packed_weight.h"
#include "common/absorbs.h"
#include "cpu/capability.h"
#include "cpu/co_attention.h"
#include "cpu/depthwise_conv3x3.h"
#include "cpu/global_attention.h"
#include "cpu/packed_mlp.h"
#include "cpu/patch_conv.h"
#include "cpu/step_clock.h"
#include "cpu/upsample_concat.h"

namespace dsnet {
namespace {

using DepthwiseCoefficients = Coefficients<cpu::DepthwiseForward, float>;

// Extents of a block, as ds_block's `sizes` has them behind x's.
struct BlockShape {
  int64_t height, width, channels;
  int64_t local, global, dim, heads, hidden;
  int64_t coarse_height, coarse_width;

  BlockShape(int64_t image_height, int64_t image_width, const std::vector<int64_t>& sizes) {
    check(sizes.size() == 8, "sizes: expected (C, Cl, Cg, dim, heads, R, Hg, Wg), got as many as ",
        sizes.size());
    height = image_height;
    width = image_width;
    int64_t* const to[] = {
        &channels, &local, &global, &dim, &heads, &hidden, &coarse_height, &coarse_width};
    for (size_t i = 0; i < sizes.size(); ++i) {
      check(sizes[i] > 0, "sizes: expected each to be at least 1, got ", shape_text(sizes));
      *to[i] = sizes[i];
    }
    check(local + global == channels, "sizes: expected Cl + Cg = C, got ", shape_text(sizes));
    check(height > 0 && width > 0, "x: expected at least one pixel, got ", height, " × ", width);
    check(dim % heads == 0 && global % heads == 0,
        "sizes: expected heads that divide Cg and dim, got ", shape_text(sizes));
    check_head_dim("sizes", dim / heads);
    check_head_dim("sizes", global / heads);
  }

  int64_t pixels() const { return height * width; }
  int64_t coarse_pixels() const { return coarse_height * coarse_width; }
  cpu::DepthwiseShape depthwise(int64_t batch, int64_t width_of_channels) const {
    return {batch, width_of_channels, height, width};
  }
  cpu::AttentionShape attention(int64_t batch) const {
    return {batch, coarse_pixels(), heads, global / heads};
  }
  cpu::CoAttentionShape co_attention(int64_t batch) const {
    return {batch, pixels(), coarse_pixels(), local, global, heads, dim / heads};
  }
  cpu::CoAttentionLayout co_attention_layout(int64_t batch) const {
    return {co_attention(batch), absorbs(pixels(), coarse_pixels(), local, heads), false};
  }
  cpu::UpsampleShape upsample(int64_t batch) const {
    return {batch, height, width, coarse_height, coarse_width, local, global, channels};
  }
};

// Where parameters lie in the packed tensor, in accumulators.
struct BlockPlaces {
  int64_t position, local_conv, split_local, split_global, attention, co_attention;
  int64_t fuse_local, fuse_global, fuse_bias, fc1, fc2;
  int64_t end = 0;

  explicit BlockPlaces(const BlockShape& s) {
    constexpr int64_t rows = cpu::DepthwiseForward::coefficient_rows;
    const int64_t C = s.channels, R = s.hidden;
    position = take(rows * cpu::padded(C));
    local_conv = take(rows * cpu::padded(s.local));
    split_local = take(PackedWeight::size(s.local, C));
    split_global = take(PackedWeight::size(s.global, C));
    attention = take(cpu::AttentionLayout(s.attention(1)).packed);
    co_attention = take(s.co_attention_layout(1).packed);
    fuse_local = take(s.local * cpu::padded(C));
    fuse_global = take(s.global * cpu::padded(C));
    fuse_bias = take(cpu::padded(C));
    fc1 = take(PackedWeight::size(R, C));
    fc2 = take(PackedWeight::size(C, R));
  }

 private:
  int64_t take(int64_t count) {
    const int64_t place = end;
    end += cpu::padded(count);
    return place;
  }
};

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
    space_.run<cpu::AttentionProjection>(kernels.pack, args,
        cpu::AttentionLayout(shape).scratch(shape), shape.heads + 1, 12 * shape.width());
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

// A block's steps on some of the images.
class Block {
 public:
  Block(const Tensor& x, const BlockShape& shape, const Tensor& packed, double attention_eps,
      double co_attention_eps)
      : space_("x", x),
        capability_(cpu::capability()),
        shape_(shape),
        places_(shape),
        packed_(packed),
        attention_eps_(attention_eps),
        co_attention_eps_(co_attention_eps),
        bytes_(space_.storage == cpu::Storage::bfloat16 ? 2 : 4),
        down_rows_(shape.height, shape.coarse_height),
        down_columns_(shape.width, shape.coarse_width),
        up_rows_(shape.coarse_height, shape.height),
        up_columns_(shape.coarse_width, shape.width) {
    check_shape("packed", packed, {places_.end});
    check(packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
        "packed: expected what ds_block_pack returns, got ",
        torch::headeronly::toString(packed.scalar_type()));
  }

  // Images of which everything between the steps stays in the second-level caches.
  int64_t images_at_a_time() const {
    constexpr int64_t cached = 1 << 20;
    return std::max<int64_t>(1, cached / (bytes_ * shape_.pixels() * shape_.channels));
  }

  struct Streams {
    void *local, *global;  // both may be null
  };

  void run(const cpu::Pixels& x, int64_t batch, void* out, Streams streams) {
    const int64_t N = batch * shape_.pixels(), M = batch * shape_.coarse_pixels();
    const int64_t C = shape_.channels, Cl = shape_.local, Cg = shape_.global;
    Workspace::Mark mark(space_);
    void* position = stored(N * C);
    void* split = stored(N * Cl);
    void* convolved = stored(N * Cl);
    void* coarse = stored(M * Cg);
    void* attended = stored(M * Cg);
    void* local = streams.local != nullptr ? streams.local : split;
    void* global = streams.global != nullptr ? streams.global : coarse;

    using Step = cpu::BlockStep;
    const auto timed = [](Step step, const auto& body) {
      const cpu::TimedStep time(step);
      body();
    };
    timed(Step::position, [&] { depthwise(batch, C, x, places_.position, false, position); });
    timed(Step::split_local,
        [&] { project(batch, position, places_.split_local, Cl, false, split); });
    timed(Step::local,
        [&] { depthwise(batch, Cl, contiguous(split, Cl), places_.local_conv, true, convolved); });
    timed(Step::split_global,
        [&] { project(batch, position, places_.split_global, Cg, true, coarse); });
    timed(Step::global_attention, [&] { attention(batch, coarse, attended); });
    timed(Step::co_attention, [&] { co_attention(batch, convolved, attended, local, global); });
    void* mixed = stored(N * C);
    timed(Step::upsample_concat, [&] { upsample_concat(batch, local, global, position, mixed); });
    timed(Step::pointwise_mlp, [&] { mlp(N, mixed, out); });
  }

 private:
  void* at(int64_t place) const { return static_cast<float*>(packed_.mutable_data_ptr()) + place; }
  // As activations are stored.
  void* stored(int64_t count) { return space_.held({(count * bytes_ + 3) / 4}); }
  cpu::Pixels contiguous(const void* data, int64_t channels) const {
    return {data, shape_.pixels() * channels, shape_.width * channels, channels};
  }

  void depthwise(int64_t batch, int64_t channels, const cpu::Pixels& x, int64_t place,
      bool is_centred, void* out) const {
    const cpu::DepthwiseShape shape = shape_.depthwise(batch, channels);
    const cpu::DepthwiseTasks tasks(shape);
    const cpu::DepthwiseForward args{shape, x, at(place), is_centred, true, out};
    const auto kernel = cpu::depthwise_forward(capability_, space_.storage);
    torch::stable::parallel_for(
        0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // A 1×1 convolution, of the pixels or of the coarse grid's samples.
  void project(
      int64_t batch, const void* x, int64_t place, int64_t outputs, bool is_sampled, void* out) {
    Workspace::Mark mark(space_);
    const bool down = is_sampled && shape_.coarse_pixels() != shape_.pixels();
    cpu::PatchConv args{};
    args.shape = {batch, down ? shape_.coarse_height : shape_.height,
        down ? shape_.coarse_width : shape_.width, shape_.channels, 1, outputs};
    args.x = contiguous(x, shape_.channels);
    args.stride_channel = 1;
    args.is_tokens = !down;
    if (down) {
      args.rows = down_rows_.taps();
      args.columns = down_columns_.taps();
    }
    const PackedWeight weight(at(place), space_.item(), outputs);
    args.packed = weight.panels;
    args.bias_row = weight.bias_row;
    args.out = out;
    run_patch_conv(space_, cpu::patch_conv(capability_, space_.storage), args);
  }

  void attention(int64_t batch, const void* x, void* out) {
    Workspace::Mark mark(space_);
    const cpu::AttentionShape shape = shape_.attention(batch);
    const cpu::AttentionLayout layout(shape);
    cpu::AttentionForward args{};
    args.shape = shape;
    args.x = x;
    args.eps = attention_eps_;
    args.packed = at(places_.attention);
    args.out = out;
    args.lse = space_.held({batch, shape.heads, shape.tokens});
    run_attention(space_, cpu::global_attention_forward(capability_, space_.storage), args, layout);
  }

  void co_attention(
      int64_t batch, const void* local, const void* global, void* local_out, void* global_out) {
    Workspace::Mark mark(space_);
    cpu::CoAttentionForward args{};
    args.shape = shape_.co_attention(batch);
    args.layout = shape_.co_attention_layout(batch);
    args.local = local;
    args.global = global;
    args.eps = co_attention_eps_;
    args.packed = at(places_.co_attention);
    args.local_softmax = space_.held({batch, shape_.heads, shape_.pixels(), 2});
    args.global_softmax = space_.held({batch, shape_.heads, shape_.coarse_pixels(), 2});
    args.attended = space_.held({batch, shape_.coarse_pixels(), shape_.dim});
    args.local_out = local_out;
    args.global_out = global_out;
    run_co_attention(space_, cpu::co_attention_forward(capability_, space_.storage), args);
  }

  void upsample_concat(
      int64_t batch, const void* local, const void* global, const void* residual, void* out) {
    Workspace::Mark mark(space_);
    const int64_t Cg = shape_.global, Wg = shape_.coarse_width;
    cpu::UpsampleForward args{};
    args.shape = shape_.upsample(batch);
    args.local = contiguous(local, shape_.local);
    args.global = {global, shape_.coarse_pixels() * Cg, Wg * Cg, Cg};
    args.residual = contiguous(residual, shape_.channels);
    args.rows = up_rows_.taps();
    args.columns = up_columns_.taps();
    args.bias_row = at(places_.fuse_bias);
    args.packed_local = at(places_.fuse_local);
    args.packed_global = at(places_.fuse_global);
    args.out = out;
    run_upsample_concat(space_, cpu::upsample_concat_forward(capability_, space_.storage), args);
  }

  void mlp(int64_t tokens, const void* x, void* out) {
    Workspace::Mark mark(space_);
    cpu::PackedMlp args{};
    args.shape = {tokens, shape_.channels, shape_.hidden};
    const PackedWeight fc1(at(places_.fc1), space_.item(), shape_.hidden);
    const PackedWeight fc2(at(places_.fc2), space_.item(), shape_.channels);
    args.x = x;
    args.fc1 = fc1.panels;
    args.fc1_bias = fc1.bias_row;
    args.fc2 = fc2.panels;
    args.fc2_bias = fc2.bias_row;
    args.out = out;
    const auto kernels = cpu::packed_mlp(capability_, space_.storage);
    const cpu::PackedMlpLayout layout(args.shape);
    const int64_t size = layout.scratch(args.shape), C = shape_.channels, R = shape_.hidden;
    if (!layout.is_few) {
      space_.run(kernels.run, args, size, layout.blocks.blocks, 2 * layout.blocks.block * C * R);
      return;
    }
    args.activations = space_.held({tokens, layout.hidden});
    const cpu::ProductTasks first(tokens, R), second(tokens, C);
    space_.run(kernels.first, args, size, first.count(), first.block * C * R / first.groups);
    space_.run(kernels.second, args, size, second.count(), second.block * C * R / second.groups);
  }

  Workspace space_;
  const cpu::Capability capability_;
  const BlockShape shape_;
  const BlockPlaces places_;
  const Tensor packed_;
  const double attention_eps_, co_attention_eps_;
  const int64_t bytes_;
  cpu::Axis down_rows_, down_columns_, up_rows_, up_columns_;
};

void check_dtype(const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
      "x: expected float32 or bfloat16, got ", torch::headeronly::toString(x.scalar_type()));
}

}  // namespace

Tensor ds_block_pack(
    const Tensor& x, const std::vector<Tensor>& parameters, const std::vector<int64_t>& sizes) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  check_dtype(x);
  return Packing(x, BlockShape(x.size(2), x.size(3), sizes), parameters).run();
}

std::tuple<Tensor, Tensor, Tensor> ds_block(const Tensor& x, const Tensor& packed,
    const std::vector<int64_t>& sizes, double attention_eps, double co_attention_eps,
    bool with_streams) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  check_dtype(x);
  const BlockShape shape(x.size(2), x.size(3), sizes);
  check_shape("x", x, {x.size(0), shape.channels, shape.height, shape.width});
  const int64_t batch = x.size(0), streams = with_streams ? batch : 0;
  const auto empty = [&](int64_t images, int64_t channels, int64_t height, int64_t width) {
    return torch::stable::empty({images, channels, height, width}, x.scalar_type(), std::nullopt,
        x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  };
  const Tensor out = empty(batch, shape.channels, shape.height, shape.width);
  const Tensor local = empty(streams, shape.local, shape.height, shape.width);
  const Tensor global = empty(streams, shape.global, shape.coarse_height, shape.coarse_width);
  if (batch == 0) return {out, local, global};

  Block block(x, shape, packed, attention_eps, co_attention_eps);
  const Tensor source = with_adjacent_channels(x);
  const int64_t item = x.scalar_type() == ScalarType::Float ? 4 : 2;
  const auto part = [&](const Tensor& tensor, int64_t image, int64_t size) -> void* {
    if (tensor.numel() == 0) return nullptr;
    return static_cast<char*>(tensor.mutable_data_ptr()) + image * size * item;
  };
  int64_t images;
  for (int64_t image = 0; image < batch; image += images) {
    images = std::min(block.images_at_a_time(), batch - image);
    cpu::Pixels pixels = pixels_of<cpu::Pixels>(source);
    pixels.data = static_cast<const char*>(pixels.data) + image * pixels.stride_batch * item;
    block.run(pixels, images, part(out, image, shape.pixels() * shape.channels),
        {part(local, image, shape.pixels() * shape.local),
            part(global, image, shape.coarse_pixels() * shape.global)});
  }
  return {out, local, global};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("ds_block_pack", TORCH_BOX(&dsnet::ds_block_pack));
  m.impl("ds_block", TORCH_BOX(&dsnet::ds_block));
}
