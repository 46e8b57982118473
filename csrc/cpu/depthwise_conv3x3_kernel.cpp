// Depthwise 3×3 convolution, forward and backward; compiled once per instruction set.
#include "depthwise_conv3x3.h"
#include "storages.h"
#include "vec.h"

// Where a call would force registers into memory.
#define DSNET_INLINE __attribute__((always_inline))

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Output rows computed together, each tap loaded once for all of them, as many as registers hold.
constexpr int forward_rows = 4;
constexpr int backward_rows = 2;

// Loads and stores of a whole register, or of the channels left at the end.
template <typename V, bool Tail>
struct Lanes {
  int64_t n;
  template <typename T>
  V load(const T* p) const {
    if constexpr (Tail)
      return V::load(p, n);
    else
      return V::load(p);
  }
  template <typename T>
  void store(const V& value, T* p) const {
    if constexpr (Tail)
      value.store(p, n);
    else
      value.store(p);
  }
};

// Where a task lies.
struct Place {
  int64_t image, slot, row_begin, row_end, channel_begin, channel_end;

  Place(int64_t task, const DepthwiseShape& shape, const DepthwiseTasks& tasks) {
    const int64_t block = task % tasks.blocks;
    slot = task / tasks.blocks;
    image = slot / tasks.strips;
    row_begin = slot % tasks.strips * DepthwiseTasks::rows_per_strip;
    row_end = smaller(row_begin + DepthwiseTasks::rows_per_strip, shape.height);
    channel_begin = block * DepthwiseTasks::channels_per_block;
    channel_end = smaller(channel_begin + DepthwiseTasks::channels_per_block, shape.channels);
  }
};

// R + 2 rows of pixels around a group of R, from the place's first channel on. The first and the
// last may lie outside the image: they read as zero.
template <int R, typename T>
struct Rows {
  const T* data[R + 2];
  int64_t stride;  // between columns
  bool has_first, has_last;

  Rows(const Pixels& pixels, const DepthwiseShape& shape, const Place& place, int64_t row)
      : stride(pixels.stride_column), has_first(row > 0), has_last(row + R < shape.height) {
    const T* image = static_cast<const T*>(pixels.data) + place.image * pixels.stride_batch;
    for (int i = 0; i < R + 2; ++i) {
      data[i] = image + (row + i - 1) * pixels.stride_row + place.channel_begin;
    }
  }

  // The rows' pixels at `offset` = column · stride + channel, each loaded once: left alone, a
  // compiler folds the load into every multiplication that uses it.
  template <typename V, typename L>
  DSNET_INLINE void load(V (&in)[R + 2], const L& lanes, int64_t offset) const {
    in[0] = has_first ? lanes.load(data[0] + offset) : V::zero();
    for (int i = 1; i < R + 1; ++i) in[i] = lanes.load(data[i] + offset);
    in[R + 1] = has_last ? lanes.load(data[R + 1] + offset) : V::zero();
    for (int i = 0; i < R + 2; ++i) in[i].keep();
  }
};

// Calls body(rows as a constant, first row) down a task: R rows at a time, what is left by halves.
template <int R, typename Body>
inline void for_each_rows(const Place& place, int64_t row, const Body& body) {
  for (; row + R <= place.row_end; row += R) body(Constant<R>{}, row);
  if constexpr (R > 1) for_each_rows<R / 2>(place, row, body);
}

// Calls body(column, first tap column inside the image, one past the last), the taps as constants.
template <typename Body>
DSNET_INLINE inline void for_each_column(int64_t width, const Body& body) {
  if (width == 1) return body(0, Constant<1>{}, Constant<2>{});
  body(0, Constant<1>{}, Constant<3>{});
  for (int64_t j = 1; j < width - 1; ++j) body(j, Constant<0>{}, Constant<3>{});
  body(width - 1, Constant<0>{}, Constant<2>{});
}

// Calls body(lanes, channel counted from the place's first) across a task's channels.
template <typename V, typename Body>
DSNET_INLINE inline void for_each_register(const Place& place, const Body& body) {
  const int64_t channels = place.channel_end - place.channel_begin;
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) body(Lanes<V, false>{V::size}, c);
  if (c < channels) body(Lanes<V, true>{channels - c}, c);
}

// Where `rows` coefficients of the register at channel c begin.
DSNET_INLINE inline int64_t coefficient_offset(int64_t c, int64_t rows) {
  const int64_t lane = c & (coefficient_lanes - 1);
  return (c - lane) * rows + lane;
}

// NOTE: channels are the innermost loop, because memory is then read in order and each page visited
// once per group of rows. Holding one register of channels and sliding along the columns needs
// fewer loads, but slows down threefold where the tensors outgrow the TLB.

template <typename T>
void forward(const DepthwiseForward& args, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const DepthwiseShape& shape = args.shape;
  const DepthwiseTasks tasks(shape);
  constexpr int64_t coefficient_rows = DepthwiseForward::coefficient_rows;
  const int64_t C = shape.channels;

  for (int64_t task = begin; task < end; ++task) {
    const Place place(task, shape, tasks);
    const Acc* coefficients = static_cast<const Acc*>(args.coefficients) +
                              coefficient_offset(place.channel_begin, coefficient_rows);
    auto rows_of = [&](auto is_centred, auto row_count, int64_t row) {
      constexpr int R = decltype(row_count)::value;
      const int64_t out_stride = shape.width * C;
      const Rows<R, T> rows(args.x, shape, place, row);
      const bool has_residual = args.residual;
      int constants[R];
      for (int i = 0; i < R; ++i) {
        constants[i] = 9 + 3 * (row + i == 0 ? 0 : row + i == shape.height - 1 ? 2 : 1);
      }
      T* out = static_cast<T*>(args.out) + place.channel_begin +
               (place.image * shape.height + row) * out_stride;

      for_each_column(shape.width, [&](int64_t j, auto v_begin, auto v_end) DSNET_INLINE {
        constexpr int column_case = v_begin.value == 1 ? 0 : v_end.value == 2 ? 2 : 1;
        for_each_register<V>(place, [&](const auto& lanes, int64_t c) DSNET_INLINE {
          const Acc* coefficient = coefficients + coefficient_offset(c, coefficient_rows);
          V sums[R], direct[R];
          for (int i = 0; i < R; ++i) {
            sums[i] = V::load(coefficient + (constants[i] + column_case) * coefficient_lanes);
          }
          for (int v = v_begin.value; v < v_end.value; ++v) {
            V in[R + 2];
            rows.load(in, lanes, (j + v - 1) * rows.stride + c);
            if (v == 1) {
              for (int i = 0; i < R; ++i) direct[i] = in[i + 1];
            }
            if constexpr (is_centred.value) {
              const V centre = V::load(coefficient + 18 * coefficient_lanes);
              if (rows.has_first) in[0] = in[0] - centre;
              for (int i = 1; i < R + 1; ++i) in[i] = in[i] - centre;
              if (rows.has_last) in[R + 1] = in[R + 1] - centre;
            }
            for (int u = 0; u < 3; ++u) {
              const V tap = V::load(coefficient + (3 * u + v) * coefficient_lanes);
              for (int i = 0; i < R; ++i) sums[i] = fma(tap, in[i + u], sums[i]);
            }
          }
          T* p = out + j * C + c;
          for (int i = 0; i < R; ++i) {
            lanes.store(has_residual ? sums[i] + direct[i] : sums[i], p + i * out_stride);
          }
        });
      });
    };
    for_each_rows<forward_rows>(place, place.row_begin, [&](auto row_count, int64_t row) {
      if (args.is_centred) {
        rows_of(Constant<1>{}, row_count, row);
      } else {
        rows_of(Constant<0>{}, row_count, row);
      }
    });
  }
}

// The gradient of z at each pixel q is the output gradient convolved with the flipped taps; every
// parameter gradient is a sum over pixels, kept in memory between columns:
//   taps k  Σ z(q)·g(q − k)    bias  Σ g    scale  Σ grad_z·x    shift  Σ grad_z
template <typename T>
void backward(const DepthwiseBackward& args, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  constexpr int gradient_rows = DepthwiseBackward::gradient_rows;
  const DepthwiseShape& shape = args.shape;
  const DepthwiseTasks tasks(shape);
  constexpr int64_t coefficient_rows = DepthwiseBackward::coefficient_rows;
  const int64_t C = shape.channels;
  const bool has_residual = args.residual;

  for (int64_t task = begin; task < end; ++task) {
    const Place place(task, shape, tasks);
    const Acc* coefficients = static_cast<const Acc*>(args.coefficients) +
                              coefficient_offset(place.channel_begin, coefficient_rows);
    // Sums over wide rows go to the totals after every few rows: a sum in float stays short.
    constexpr int64_t sums_size = DepthwiseTasks::channels_per_block * gradient_rows;
    constexpr int64_t wide = 64;
    alignas(64) Acc all_sums[sums_size] = {}, totals[sums_size] = {};
    for_each_rows<backward_rows>(place, place.row_begin, [&](auto row_count, int64_t row) {
      constexpr int R = decltype(row_count)::value;
      const int64_t out_stride = shape.width * C;
      const Rows<R, T> grads(args.grad, shape, place, row);
      const Rows<R, T> inputs(args.x, shape, place, row);
      T* grad_x = static_cast<T*>(args.grad_x) + place.channel_begin +
                  (place.image * shape.height + row) * out_stride;

      for_each_column(shape.width, [&](int64_t j, auto v_begin, auto v_end) DSNET_INLINE {
        for_each_register<V>(place, [&](const auto& lanes, int64_t c) DSNET_INLINE {
          const Acc* coefficient = coefficients + coefficient_offset(c, coefficient_rows);
          Acc* sums = all_sums + coefficient_offset(c, gradient_rows);
          auto add = [&](int k, const V& value) DSNET_INLINE {
            (V::load(sums + k * coefficient_lanes) + value).store(sums + k * coefficient_lanes);
          };
          const V scale = V::load(coefficient + 9 * coefficient_lanes);
          const V centre = V::load(coefficient + 10 * coefficient_lanes);
          const V rest = V::load(coefficient + 11 * coefficient_lanes);
          V x[R], z[R], grad_z[R], direct[R];
          for (int i = 0; i < R; ++i) {
            x[i] = lanes.load(inputs.data[i + 1] + j * inputs.stride + c);
            z[i] = fma(scale, x[i] - centre, rest);
            grad_z[i] = V::zero();
          }
          for (int v = v_begin.value; v < v_end.value; ++v) {
            V g[R + 2];
            grads.load(g, lanes, (j + v - 1) * grads.stride + c);
            for (int u = 0; u < 3; ++u) {
              const int k = 8 - (3 * u + v);
              const V tap = V::load(coefficient + k * coefficient_lanes);
              V sum = V::load(sums + k * coefficient_lanes);
              for (int i = 0; i < R; ++i) {
                grad_z[i] = fma(tap, g[i + u], grad_z[i]);
                sum = fma(z[i], g[i + u], sum);
              }
              sum.store(sums + k * coefficient_lanes);
            }
            if (v == 1) {
              for (int i = 0; i < R; ++i) direct[i] = g[i + 1];
            }
          }
          V sum_grad = V::zero(), sum_scale = V::zero(), sum_shift = V::zero();
          T* p = grad_x + j * C + c;
          for (int i = 0; i < R; ++i) {
            lanes.store(
                fma(scale, grad_z[i], has_residual ? direct[i] : V::zero()), p + i * out_stride);
            sum_grad = sum_grad + direct[i];
            sum_scale = fma(grad_z[i], x[i], sum_scale);
            sum_shift = sum_shift + grad_z[i];
          }
          add(9, sum_grad);
          add(10, sum_scale);
          add(11, sum_shift);
        });
      });
      for (int64_t i = 0; shape.width > wide && i < sums_size; ++i) {
        totals[i] += all_sums[i];
        all_sums[i] = 0;
      }
    });

    Acc* out =
        static_cast<Acc*>(args.partials) + place.slot * gradient_rows * C + place.channel_begin;
    for (int64_t c = 0; c < place.channel_end - place.channel_begin; ++c) {
      const int64_t first = coefficient_offset(c, gradient_rows);
      for (int k = 0; k < gradient_rows; ++k) {
        const int64_t i = first + k * coefficient_lanes;
        out[k * C + c] = totals[i] + all_sums[i];
      }
    }
  }
}

}  // namespace

DSNET_DEFINE_KERNELS(DepthwiseForwardKernel, depthwise_forward, forward)
DSNET_DEFINE_KERNELS(DepthwiseBackwardKernel, depthwise_backward, backward)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
