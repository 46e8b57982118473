// Extents of a block, and where its packed parameters lie.
#pragma once

#include <vector>

#include "bindings/cpu/packed_weight.h"
#include "common/absorbs.h"
#include "cpu/co_attention.h"
#include "cpu/depthwise_conv3x3.h"
#include "cpu/global_attention.h"
#include "cpu/patch_conv.h"
#include "cpu/upsample_concat.h"

namespace dsnet {

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

inline void check_block_dtype(const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
      "x: expected float32 or bfloat16, got ", torch::headeronly::toString(x.scalar_type()));
}

}  // namespace dsnet
