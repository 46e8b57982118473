// A whole block in inference on the CPU: the kernels of its operations, one after the other, on as
// many images as stay in the cache, with parameters packed once.
#include <algorithm>
#include <vector>

#include "bindings/cpu/ds_block_layout.h"
#include "bindings/cpu/forward_steps.h"
#include "cpu/capability.h"
#include "cpu/packed_mlp.h"
#include "cpu/step_clock.h"

namespace dsnet {
namespace {

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
        up_columns_(shape.coarse_width, shape.width) {}

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
    args.shape = {tokens, shape_.channels, shape_.hidden, bytes_};
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

// Images of which what lies between the steps stays in a second-level cache, or nearly.
int64_t images_at_a_time(const BlockShape& shape, int64_t batch, int64_t item) {
  constexpr int64_t cached = 1 << 20;
  const int64_t fitting = cached / (item * shape.pixels() * shape.channels);
  const int64_t most = std::max<int64_t>(1, batch < 4 ? fitting : std::min(fitting, batch / 2));
  const int64_t parts = (batch + most - 1) / most;
  return (batch + parts - 1) / parts;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ds_block(const Tensor& x, const Tensor& packed,
    const std::vector<int64_t>& sizes, double attention_eps, double co_attention_eps,
    bool with_streams) {
  check(x.dim() == 4, "x: expected shape (B, C, H, W), got ", shape_text(x.sizes()));
  check_block_dtype(x);
  const BlockShape shape(x.size(2), x.size(3), sizes);
  check_shape("x", x, {x.size(0), shape.channels, shape.height, shape.width});
  check_shape("packed", packed, {BlockPlaces(shape).end});
  check(packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
      "packed: expected what ds_block_pack returns, got ",
      torch::headeronly::toString(packed.scalar_type()), packed.is_contiguous() ? "" : ", strided");
  const int64_t batch = x.size(0), streams = with_streams ? batch : 0;
  const auto empty = [&](int64_t images, int64_t channels, int64_t height, int64_t width) {
    return torch::stable::empty({images, channels, height, width}, x.scalar_type(), std::nullopt,
        x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  };
  const Tensor out = empty(batch, shape.channels, shape.height, shape.width);
  const Tensor local = empty(streams, shape.local, shape.height, shape.width);
  const Tensor global = empty(streams, shape.global, shape.coarse_height, shape.coarse_width);
  if (batch == 0) return {out, local, global};

  const Tensor source = with_adjacent_channels(x);
  const int64_t item = x.scalar_type() == ScalarType::Float ? 4 : 2;
  const auto part = [&](const Tensor& tensor, int64_t image, int64_t size) -> void* {
    if (tensor.numel() == 0) return nullptr;
    return static_cast<char*>(tensor.mutable_data_ptr()) + image * size * item;
  };
  const int64_t share = images_at_a_time(shape, batch, item), parts = (batch + share - 1) / share;
  const auto run = [&](int64_t begin, int64_t end) {
    Block block(x, shape, packed, attention_eps, co_attention_eps);
    for (int64_t image = begin * share; image < std::min(end * share, batch); image += share) {
      cpu::Pixels pixels = pixels_of<cpu::Pixels>(source);
      pixels.data = static_cast<const char*>(pixels.data) + image * pixels.stride_batch * item;
      block.run(pixels, std::min(share, batch - image),
          part(out, image, shape.pixels() * shape.channels),
          {part(local, image, shape.pixels() * shape.local),
              part(global, image, shape.coarse_pixels() * shape.global)});
    }
  };
  // Threads take parts of their own or, as where steps are timed, share those of one after the
  // other.
  const bool timed = cpu::steps_are_watched.load();
  if (!timed && parts % torch::stable::get_num_threads() == 0) {
    torch::stable::parallel_for(0, parts, 1, run);
  } else {
    run(0, parts);
  }
  return {out, local, global};
}

}  // namespace dsnet

STABLE_TORCH_LIBRARY_IMPL(dsnet_kernels, CPU, m) {
  m.impl("ds_block", TORCH_BOX(&dsnet::ds_block));
}
