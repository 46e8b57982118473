// Depthwise 3×3 convolution on the GPU: kernels. To be included by one translation unit.
//
// A thread owns one column of one image and a pack of neighbouring channels, and goes down the
// rows of a strip: it loads three pixels of a row while it computes with those of the row before,
// and adds each to the three output rows that it touches.
#pragma once

#include "cuda/depthwise_conv3x3.h"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/sum_slots.h"

namespace dsnet::cuda {

namespace detail {

// What a thread works on.
struct Place {
  int64_t slot, group;
  int row_begin, row_end;
  int row_first, row_last;  // with the rows around them that the image has
  int64_t first_column;     // of B·W
  int channel_in_block;
  int64_t channel;

  DSNET_DEVICE Place(const DepthwiseLaunch& l, const DepthwiseShape& shape) {
    const auto groups = static_cast<unsigned>(l.groups), strips = static_cast<unsigned>(l.strips);
    group = blockIdx.x % groups;
    slot = blockIdx.x / groups;
    const unsigned strip = static_cast<unsigned>(slot) % strips;
    const int64_t begin = strip * l.rows, end = begin + l.rows;
    row_begin = static_cast<int>(begin);
    row_end = static_cast<int>(end < shape.height ? end : shape.height);
    row_first = row_begin > 0 ? row_begin - 1 : 0;
    row_last = row_end < shape.height ? row_end : row_end - 1;
    first_column = int64_t{static_cast<unsigned>(slot) / strips} * l.threads_y + threadIdx.y;
    channel_in_block = static_cast<int>(threadIdx.x) * l.pack;
    channel = group * l.threads_x * l.pack + channel_in_block;
  }
};

// Where channel `channel` of a pixel lies.
template <typename T>
DSNET_DEVICE const T* pixel_at(
    const Pixels& pixels, int64_t image, int64_t row, int64_t column, int64_t channel) {
  return static_cast<const T*>(pixels.data) + image * pixels.stride_batch +
         row * pixels.stride_row + column * pixels.stride_column + channel;
}

// The pixels of a row left of, at and right of `here`; zero outside the image.
template <typename T, int P>
DSNET_DEVICE void load_three(
    const T* here, int64_t stride_column, bool has_left, bool has_right, Stored<T, P> (&out)[3]) {
  out[0] = has_left ? load_global<Stored<T, P>>(here - stride_column) : Stored<T, P>{};
  out[1] = load_global<Stored<T, P>>(here);
  out[2] = has_right ? load_global<Stored<T, P>>(here + stride_column) : Stored<T, P>{};
}

// out += a · b by channel.
template <int P>
DSNET_DEVICE void add_product(const float (&a)[P], const float (&b)[P], float (&out)[P]) {
#pragma unroll
  for (int c = 0; c < P; ++c) out[c] = fmaf(a[c], b[c], out[c]);
}

// P values next to each other in shared memory.
template <int P>
DSNET_DEVICE void read_shared(const float* p, float (&out)[P]) {
  constexpr int width = P < 4 ? P : 4;
#pragma unroll
  for (int i = 0; i < P; i += width) {
    const auto part = load_shared<Pack<float, width>>(p + i);
#pragma unroll
    for (int k = 0; k < width; ++k) out[i + k] = part.values[k];
  }
}

}  // namespace detail

// Table of a block's channels: 9 taps w·scale (centre + 1 with the residual), then 3 × 3 constants
// bias + shift·Σ w over the taps inside the image, for the first / an inner / the last row ×
// column. A dimension of size 1 has its outer taps zeroed.
//
// For float32 a centre = −shift / scale follows: x enters as x − centre, and the constants hold
// only what rounding leaves of shift. Folding all of shift into them would round at |scale·x|, not
// at its sum with shift, which only storage in 16 bits hides; the residual is then added by itself.
template <typename T>
constexpr bool is_centred = sizeof(T) == 4;

template <typename T>
DSNET_DEVICE void fill_forward_table(
    const DepthwiseForward& args, int64_t first_channel, int channels, float* table) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < channels; i += threads) {
    const int64_t c = first_channel + i;
    if (c >= args.shape.channels) break;
    const float scale = parameter_at<T>(args.scale, c, 1);
    float shift = parameter_at<T>(args.shift, c, 0);
    const float bias = parameter_at<T>(args.bias, c, 0);
    if constexpr (is_centred<T>) {
      const float quotient = -shift / scale;
      const float centre = fabsf(quotient) <= 3.4028234e38f ? quotient : 0.0f;
      shift = fmaf(scale, centre, shift);
      store_shared(table + 18 * channels + i, centre);
    }
    float row_sums[3][3];  // tap row × column case
#pragma unroll
    for (int u = 0; u < 3; ++u) {
      float taps[3];
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        const bool outside =
            (u != 1 && args.shape.height == 1) || (v != 1 && args.shape.width == 1);
        taps[v] = outside ? 0.0f : parameter_at<T>(args.weight, 9 * c + 3 * u + v, 0);
        const bool has_identity = args.residual && !is_centred<T> && u == 1 && v == 1;
        const float identity = has_identity ? 1.0f : 0.0f;
        store_shared(table + (3 * u + v) * channels + i, fmaf(taps[v], scale, identity));
      }
      row_sums[u][0] = taps[1] + taps[2];
      row_sums[u][1] = taps[0] + taps[1] + taps[2];
      row_sums[u][2] = taps[0] + taps[1];
    }
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      const float first = row_sums[1][column] + row_sums[2][column];
      const float inner = row_sums[0][column] + first;
      const float last = row_sums[0][column] + row_sums[1][column];
      store_shared(table + (9 + column) * channels + i, fmaf(shift, first, bias));
      store_shared(table + (12 + column) * channels + i, fmaf(shift, inner, bias));
      store_shared(table + (15 + column) * channels + i, fmaf(shift, last, bias));
    }
  }
}

// Blocks that share a multiprocessor: as many as the registers of a pack allow without spills.
constexpr int forward_blocks(int pack, size_t item) { return pack == 1 ? 8 : item == 4 ? 5 : 3; }
constexpr int backward_blocks(int pack, size_t item) { return pack == 1 ? 5 : item == 4 ? 2 : 3; }

template <typename T, int P>
__global__ void __launch_bounds__(DepthwiseLaunch::threads, forward_blocks(P, sizeof(T)))
    depthwise_conv3x3_forward(const DepthwiseForward args, const DepthwiseLaunch l) {
  __shared__ SharedArray<float, 19 * DepthwiseLaunch::max_block_channels> table_storage;
  float* table = table_storage;
  const DepthwiseShape& shape = args.shape;
  const detail::Place place(l, shape);
  const int channels = l.threads_x * P;
  fill_forward_table<T>(args, place.group * channels, channels, table);
  __syncthreads();
  if (place.channel >= shape.channels) return;

  table += place.channel_in_block;
  float taps[9][P];
#pragma unroll
  for (int k = 0; k < 9; ++k) detail::read_shared(table + k * channels, taps[k]);
  float centre[P];
  if constexpr (is_centred<T>) detail::read_shared(table + 18 * channels, centre);

  const int64_t row_stride = shape.width * shape.channels;
  const int64_t step = l.column_blocks * l.threads_y;
  for (int64_t index = place.first_column; index < shape.batch * shape.width; index += step) {
    const int64_t image = index / shape.width, column = index % shape.width;
    const bool has_left = column > 0, has_right = column + 1 < shape.width;
    const T* source = detail::pixel_at<T>(args.x, image, place.row_first, column, place.channel);
    T* out = static_cast<T*>(args.out) + (image * shape.height + place.row_begin) * row_stride +
             column * shape.channels + place.channel;
    const float* constants = table + (9 + (!has_left ? 0 : has_right ? 1 : 2)) * channels;
    const auto start = [&](int row, float (&sum)[P]) {
      const int row_case = row == 0 ? 0 : row + 1 >= shape.height ? 2 : 1;
      detail::read_shared(constants + 3 * row_case * channels, sum);
    };

    // Sums of the output rows above, at and below the input row.
    float above[P] = {}, here[P], below[P];
    start(place.row_first, here);
    Stored<T, P> next[3];
    detail::load_three<T, P>(source, args.x.stride_column, has_left, has_right, next);
    for (int row = place.row_first; row <= place.row_last; ++row) {
      float in[3][P];
#pragma unroll
      for (int v = 0; v < 3; ++v) widen<T>(next[v], in[v]);
      if (row < place.row_last) {
        source += args.x.stride_row;
        detail::load_three<T, P>(source, args.x.stride_column, has_left, has_right, next);
      }
      start(row + 1, below);
      if constexpr (is_centred<T>) {
#pragma unroll
        for (int c = 0; c < P; ++c) {
          if (args.residual) here[c] += in[1][c];
          in[0][c] = has_left ? in[0][c] - centre[c] : 0.0f;
          in[1][c] -= centre[c];
          in[2][c] = has_right ? in[2][c] - centre[c] : 0.0f;
        }
      }
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        detail::add_product(taps[6 + v], in[v], above);
        detail::add_product(taps[3 + v], in[v], here);
        detail::add_product(taps[v], in[v], below);
      }
      if (row > place.row_begin) {
        store_global(out, narrow<T>(above));
        out += row_stride;
      }
#pragma unroll
      for (int c = 0; c < P; ++c) {
        above[c] = here[c];
        here[c] = below[c];
      }
    }
    if (place.row_end == shape.height) store_global(out, narrow<T>(above));
  }
}

// Table of a block's channels: the taps from last to first, then scale, then shift.
template <typename T>
DSNET_DEVICE void fill_backward_table(
    const DepthwiseBackward& args, int64_t first_channel, int channels, float* table) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < channels; i += threads) {
    const int64_t c = first_channel + i;
    if (c >= args.shape.channels) break;
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      store_shared(table + k * channels + i, parameter_at<T>(args.weight, 9 * c + 8 - k, 0));
    }
    store_shared(table + 9 * channels + i, parameter_at<T>(args.scale, c, 1));
    store_shared(table + 10 * channels + i, parameter_at<T>(args.shift, c, 0));
  }
}

// The gradient of z = scale·x + shift at each pixel is the output gradient g convolved with the
// flipped taps; every parameter gradient is a sum over pixels:
//   taps k  Σ z(q)·g(q − k)    bias  Σ g    scale  Σ grad_z·x    shift  Σ grad_z
template <typename T, int P>
__global__ void __launch_bounds__(DepthwiseLaunch::threads, backward_blocks(P, sizeof(T)))
    depthwise_conv3x3_backward(const DepthwiseBackward args, const DepthwiseLaunch l) {
  constexpr int rows_at_once = 4;
  constexpr int gradient_rows = DepthwiseBackward::gradient_rows;
  static_assert(gradient_rows % rows_at_once == 0, "the block sums its rows in equal parts");
  __shared__ SharedArray<float, rows_at_once * DepthwiseLaunch::threads * P> exchange_storage;
  __shared__ SharedArray<float, 11 * DepthwiseLaunch::max_block_channels> table_storage;
  float* exchange = exchange_storage;
  float* table = table_storage;
  const DepthwiseShape& shape = args.shape;
  const detail::Place place(l, shape);
  const int channels = l.threads_x * P;
  const bool is_active = place.channel < shape.channels;

  fill_backward_table<T>(args, place.group * channels, channels, table);
  __syncthreads();
  float taps[9][P] = {}, scale[P] = {}, shift[P] = {};
  if (is_active) {
    const float* values = table + place.channel_in_block;
#pragma unroll
    for (int k = 0; k < 9; ++k) detail::read_shared(values + k * channels, taps[k]);
    detail::read_shared(values + 9 * channels, scale);
    detail::read_shared(values + 10 * channels, shift);
  }
  float sums[gradient_rows][P] = {};

  const int64_t row_stride = shape.width * shape.channels;
  const int64_t step = l.column_blocks * l.threads_y;
  const int64_t columns = is_active ? shape.batch * shape.width : 0;
  for (int64_t index = place.first_column; index < columns; index += step) {
    const int64_t image = index / shape.width, column = index % shape.width;
    const bool has_left = column > 0, has_right = column + 1 < shape.width;
    const T* grad = detail::pixel_at<T>(args.grad, image, place.row_first, column, place.channel);
    const T* x = detail::pixel_at<T>(args.x, image, place.row_begin, column, place.channel);
    T* grad_x = static_cast<T*>(args.grad_x) +
                (image * shape.height + place.row_begin) * row_stride + column * shape.channels +
                place.channel;
    // The next x of this strip's rows.
    const auto load_x = [&](bool is_own) {
      if (!is_own) return Stored<T, P>{};
      const auto pack = load_global<Stored<T, P>>(x);
      x += args.x.stride_row;
      return pack;
    };
    // z of this strip's rows, zero elsewhere.
    const auto affine = [&](bool is_own, const Stored<T, P>& pack, float (&z)[P]) {
      float value[P];
      widen<T>(pack, value);
#pragma unroll
      for (int c = 0; c < P; ++c) z[c] = is_own ? fmaf(scale[c], value[c], shift[c]) : 0.0f;
    };

    float above[P] = {}, here[P] = {};  // sums of grad_z
    float z_above[P] = {}, z_here[P];
    const bool starts_inside = place.row_first == place.row_begin;
    Stored<T, P> x_above{}, x_here = load_x(starts_inside);
    Stored<T, P> x_below = load_x(place.row_first + 1 < place.row_end);
    affine(starts_inside, x_here, z_here);
    Stored<T, P> grad_above{}, next[3];
    detail::load_three<T, P>(grad, args.grad.stride_column, has_left, has_right, next);

    // Row above is complete: its grad_x, and its share of the sums.
    const auto finish = [&] {
      float x_value[P], grad_value[P], result[P];
      widen<T>(x_above, x_value);
      widen<T>(grad_above, grad_value);
      detail::add_product(above, x_value, sums[10]);
#pragma unroll
      for (int c = 0; c < P; ++c) {
        sums[9][c] += grad_value[c];
        sums[11][c] += above[c];
        result[c] = fmaf(scale[c], above[c], args.residual ? grad_value[c] : 0.0f);
      }
      store_global(grad_x, narrow<T>(result));
      grad_x += row_stride;
    };

    for (int row = place.row_first; row <= place.row_last; ++row) {
      float g[3][P], below[P] = {}, z_below[P];
      const Stored<T, P> grad_here = next[1];
#pragma unroll
      for (int v = 0; v < 3; ++v) widen<T>(next[v], g[v]);
      if (row < place.row_last) {
        grad += args.grad.stride_row;
        detail::load_three<T, P>(grad, args.grad.stride_column, has_left, has_right, next);
      }
      const Stored<T, P> x_next = load_x(row + 2 < place.row_end);
      affine(row + 1 < place.row_end, x_below, z_below);
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        detail::add_product(taps[6 + v], g[v], above);
        detail::add_product(taps[3 + v], g[v], here);
        detail::add_product(taps[v], g[v], below);
        // Tap column v pairs z with the gradient one column to the right for v = 0.
        detail::add_product(z_above, g[2 - v], sums[v]);
        detail::add_product(z_here, g[2 - v], sums[3 + v]);
        detail::add_product(z_below, g[2 - v], sums[6 + v]);
      }
      if (row > place.row_begin) finish();
#pragma unroll
      for (int c = 0; c < P; ++c) {
        above[c] = here[c];
        here[c] = below[c];
        z_above[c] = z_here[c];
        z_here[c] = z_below[c];
      }
      grad_above = grad_here;
      x_above = x_here;
      x_here = x_below;
      x_below = x_next;
    }
    if (place.row_end == shape.height) finish();
  }

  // The block's columns, in order.
  const int thread = static_cast<int>(threadIdx.y) * l.threads_x + static_cast<int>(threadIdx.x);
#pragma unroll
  for (int part = 0; part < gradient_rows; part += rows_at_once) {
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      Pack<float, P> pack;
#pragma unroll
      for (int c = 0; c < P; ++c) pack.values[c] = sums[part + r][c];
      const int place_in_exchange = (r * l.threads_y + static_cast<int>(threadIdx.y)) * channels;
      store_shared(exchange + place_in_exchange + place.channel_in_block, pack);
    }
    __syncthreads();
    for (int i = thread; i < rows_at_once * channels; i += l.threads_x * l.threads_y) {
      const int r = i / channels, c = i % channels;
      const int64_t channel = place.group * channels + c;
      float sum = 0;
      for (int y = 0; y < l.threads_y; ++y) {
        sum += load_shared<float>(exchange + (r * l.threads_y + y) * channels + c);
      }
      if (channel < shape.channels) {
        const int64_t row = place.slot * gradient_rows + part + r;
        store_global(args.partials + row * shape.channels + channel, sum);
      }
    }
    __syncthreads();
  }
}

inline Grid depthwise_grid(const DepthwiseLaunch& l) {
  return {dim3{static_cast<unsigned>(l.blocks())},
      dim3{static_cast<unsigned>(l.threads_x), static_cast<unsigned>(l.threads_y)}};
}

}  // namespace dsnet::cuda
