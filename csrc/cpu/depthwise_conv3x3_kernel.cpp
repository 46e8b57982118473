// Depthwise 3×3 convolution, forward and backward; compiled once per instruction set.
#include "depthwise_conv3x3.h"
#include "vec.h"

// Where a call would force registers into memory.
#define DSNET_INLINE __attribute__((always_inline))

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};
using Yes = Constant<1>;
using No = Constant<0>;

// Output rows of one sweep: the forward holds 9 taps, 3 sums and an input or so per row; the
// backward four registers more.
template <typename V>
constexpr int forward_rows = V::registers >= 32 ? 4 : 1;
template <typename V>
constexpr int backward_rows = V::registers >= 32 ? 2 : 1;

// One row of pixels as a sweep reads it; a row outside the image is one zero pixel, stride 0.
template <typename T>
struct Row {
  const T* data;
  int64_t stride;
};

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

// Slides over the columns of R output rows, one register of channels wide. Each column of R + 2
// inputs is loaded once and added to the three output columns that it touches.
//   taps(k)              tap k = 3·row + column
//   start(i, column)     initial sum of output row i; column 0 first, 1 inner, 2 last
//   finish(i, j, sum)    receives output (i, j)
template <int R, typename V, typename T, typename L, typename Start, typename Finish>
DSNET_INLINE inline void sweep(const Row<T> (&rows)[R + 2], int64_t channel, int64_t width,
    const L& lanes, const V (&taps)[9], const Start& start, const Finish& finish) {
  V before[R], here[R], after[R];
  auto step = [&](int64_t j, auto is_first, auto is_last, int next_column) DSNET_INLINE {
    V in[R + 2];
    for (int i = 0; i < R + 2; ++i) in[i] = lanes.load(rows[i].data + j * rows[i].stride + channel);
    for (int i = 0; i < R; ++i) {
      if constexpr (!is_last.value) after[i] = start(i, next_column);
      for (int u = 0; u < 3; ++u) {
        if constexpr (!is_first.value) before[i] = fma(taps[3 * u + 2], in[i + u], before[i]);
        here[i] = fma(taps[3 * u + 1], in[i + u], here[i]);
        if constexpr (!is_last.value) after[i] = fma(taps[3 * u], in[i + u], after[i]);
      }
      if constexpr (!is_first.value) finish(i, j - 1, before[i]);
      if constexpr (is_last.value) finish(i, j, here[i]);
      before[i] = here[i];
      if constexpr (!is_last.value) here[i] = after[i];
    }
  };
  for (int i = 0; i < R; ++i) here[i] = start(i, 0);
  if (width == 1) {
    step(0, Yes{}, Yes{}, 2);
    return;
  }
  step(0, Yes{}, No{}, width == 2 ? 2 : 1);
  for (int64_t j = 1; j < width - 1; ++j) step(j, No{}, No{}, j == width - 2 ? 2 : 1);
  step(width - 1, No{}, Yes{}, 2);
}

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

// From the place's first channel on.
template <typename T>
Row<T> row_of(const Pixels& pixels, const DepthwiseShape& shape, const Place& place, int64_t row) {
  alignas(64) static const T zeros[DepthwiseTasks::channels_per_block] = {};
  if (row < 0 || row >= shape.height) return {zeros, 0};
  const T* data = static_cast<const T*>(pixels.data) + place.image * pixels.stride_batch;
  return {data + row * pixels.stride_row + place.channel_begin, pixels.stride_column};
}

// Calls body(rows as a constant, first row) down a task: R rows at a time, what is left by halves.
template <int R, typename Body>
inline void for_each_rows(const Place& place, int64_t row, const Body& body) {
  for (; row + R <= place.row_end; row += R) body(Constant<R>{}, row);
  if constexpr (R > 1) for_each_rows<R / 2>(place, row, body);
}

// Calls body(lanes, channel counted from the place's first) across a task.
template <typename V, typename Body>
DSNET_INLINE inline void for_each_register(const Place& place, const Body& body) {
  const int64_t channels = place.channel_end - place.channel_begin;
  int64_t c = 0;
  for (; c + V::size <= channels; c += V::size) body(Lanes<V, false>{V::size}, c);
  if (c < channels) body(Lanes<V, true>{channels - c}, c);
}

template <typename T>
void forward(const DepthwiseForward& args, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const DepthwiseShape& shape = args.shape;
  const DepthwiseTasks tasks(shape);
  const int64_t C = shape.channels;

  for (int64_t task = begin; task < end; ++task) {
    const Place place(task, shape, tasks);
    const Acc* coefficients = static_cast<const Acc*>(args.coefficients) + place.channel_begin;
    auto sweep_rows = [&](auto row_count, int64_t row) {
      constexpr int R = decltype(row_count)::value;
      Row<T> rows[R + 2];
      const Acc* constants[R];
      for (int i = 0; i < R + 2; ++i) rows[i] = row_of<T>(args.x, shape, place, row + i - 1);
      for (int i = 0; i < R; ++i) {
        const int64_t row_case = row + i == 0 ? 0 : row + i == shape.height - 1 ? 2 : 1;
        constants[i] = coefficients + (9 + 3 * row_case) * C;
      }
      T* out = static_cast<T*>(args.out) + place.channel_begin +
               (place.image * shape.height + row) * shape.width * C;

      for_each_register<V>(place, [&](const auto& lanes, int64_t c) {
        V taps[9];
        for (int k = 0; k < 9; ++k) taps[k] = lanes.load(coefficients + k * C + c);
        sweep<R>(
            rows, c, shape.width, lanes, taps,
            [&](int i, int column)
                DSNET_INLINE { return lanes.load(constants[i] + column * C + c); },
            [&](int i, int64_t j, const V& sum)
                DSNET_INLINE { lanes.store(sum, out + (i * shape.width + j) * C + c); });
      });
    };
    for_each_rows<forward_rows<V>>(place, place.row_begin, sweep_rows);
  }
}

// The gradient of z at each pixel is the output gradient convolved with the flipped taps; every
// parameter gradient is a sum over pixels:
//   taps k  Σ z(q)·g(q − k)    bias  Σ g    scale  Σ grad_z·x    shift  Σ grad_z
// A first sweep forms grad_z and the last three, a second one the taps, while the rows are in L1.
template <typename T>
void backward(const DepthwiseBackward& args, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  constexpr int gradient_rows = DepthwiseBackward::gradient_rows;
  const DepthwiseShape& shape = args.shape;
  const DepthwiseTasks tasks(shape);
  const int64_t C = shape.channels;

  for (int64_t task = begin; task < end; ++task) {
    const Place place(task, shape, tasks);
    const Acc* coefficients = static_cast<const Acc*>(args.coefficients) + place.channel_begin;
    Acc* sums =
        static_cast<Acc*>(args.partials) + place.slot * gradient_rows * C + place.channel_begin;
    for (int k = 0; k < gradient_rows; ++k) {
      for (int64_t c = 0; c < place.channel_end - place.channel_begin; ++c) sums[k * C + c] = 0;
    }
    auto sweep_rows = [&](auto row_count, int64_t row) {
      constexpr int R = decltype(row_count)::value;
      Row<T> grads[R + 2], inputs[R];
      for (int i = 0; i < R + 2; ++i) grads[i] = row_of<T>(args.grad, shape, place, row + i - 1);
      for (int i = 0; i < R; ++i) inputs[i] = row_of<T>(args.x, shape, place, row + i);
      T* grad_x = static_cast<T*>(args.grad_x) + place.channel_begin +
                  (place.image * shape.height + row) * shape.width * C;

      for_each_register<V>(place, [&](const auto& lanes, int64_t c) {
        const V scale = lanes.load(coefficients + 9 * C + c);
        const V shift = lanes.load(coefficients + 10 * C + c);
        auto at = [&](const Row<T>& source, int64_t j)
                      DSNET_INLINE { return lanes.load(source.data + j * source.stride + c); };
        auto add = [&](int k, const V& value) DSNET_INLINE {
          Acc* p = sums + k * C + c;
          lanes.store(lanes.load(p) + value, p);
        };

        V taps[9];
        for (int k = 0; k < 9; ++k) taps[k] = lanes.load(coefficients + (8 - k) * C + c);
        V sum_grad = V::zero(), sum_scale = V::zero(), sum_shift = V::zero();
        sweep<R>(
            grads, c, shape.width, lanes, taps, [](int, int) DSNET_INLINE { return V::zero(); },
            [&](int i, int64_t j, const V& grad_z) DSNET_INLINE {
              const V g = at(grads[i + 1], j);
              const V direct = args.residual ? g : V::zero();
              lanes.store(fma(scale, grad_z, direct), grad_x + (i * shape.width + j) * C + c);
              sum_grad = sum_grad + g;
              sum_scale = fma(grad_z, at(inputs[i], j), sum_scale);
              sum_shift = sum_shift + grad_z;
            });
        add(9, sum_grad);
        add(10, sum_scale);
        add(11, sum_shift);

        // Tap row u pairs z of a row with the gradient one row below for u = 0.
        V sum_taps[9];
        for (int k = 0; k < 9; ++k) sum_taps[k] = V::zero();
        for (int i = 0; i < R; ++i) {
          auto z_at = [&](int64_t j) DSNET_INLINE { return fma(scale, at(inputs[i], j), shift); };
          V left = V::zero(), here = z_at(0);
          auto pair_column = [&](int64_t j, const V& right) DSNET_INLINE {
            for (int u = 0; u < 3; ++u) {
              const V g = at(grads[i + 2 - u], j);
              sum_taps[3 * u] = fma(left, g, sum_taps[3 * u]);
              sum_taps[3 * u + 1] = fma(here, g, sum_taps[3 * u + 1]);
              sum_taps[3 * u + 2] = fma(right, g, sum_taps[3 * u + 2]);
            }
            left = here;
            here = right;
          };
          for (int64_t j = 0; j < shape.width - 1; ++j) pair_column(j, z_at(j + 1));
          pair_column(shape.width - 1, V::zero());
        }
        for (int k = 0; k < 9; ++k) add(k, sum_taps[k]);
      });
    };
    for_each_rows<backward_rows<V>>(place, place.row_begin, sweep_rows);
  }
}

}  // namespace

DepthwiseForwardKernel depthwise_forward(Storage storage) {
  switch (storage) {
    case Storage::float32: return forward<float>;
    case Storage::bfloat16: return forward<bfloat16>;
    case Storage::float64: return forward<double>;
  }
  return nullptr;
}

DepthwiseBackwardKernel depthwise_backward(Storage storage) {
  switch (storage) {
    case Storage::float32: return backward<float>;
    case Storage::bfloat16: return backward<bfloat16>;
    case Storage::float64: return backward<double>;
  }
  return nullptr;
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
