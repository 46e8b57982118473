// Upsampling, concatenation and mixing, forward; compiled once per instruction set.
//
// A 1×1 convolution and bilinear interpolation commute: the global half is mixed on its own grid
// and interpolated where a tile of the local half's products starts its sums.
#include "packed_product_steps.h"
#include "storages.h"
#include "upsample_concat.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

template <typename T>
void pack(const UpsampleForward& args, void* memory, int64_t begin, int64_t end) {
  const UpsampleShape& shape = args.shape;
  const int64_t C = shape.channels, stride = shape.weight_columns(), Cl = shape.local_channels;
  pack_weight<T>({args.weight, args.bias, C, stride, 0, Cl, args.packed_local, args.bias_row},
      memory, begin, end);
  pack_weight<T>(
      {args.weight, args.bias, C, stride, Cl, shape.global_channels, args.packed_global, nullptr},
      memory, begin, end);
}

template <typename T>
void mix_global(const UpsampleForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const UpsampleShape& shape = args.shape;
  const UpsampleLayout layout(shape);
  const int64_t Wg = shape.global_width, Hg = shape.global_height, Cg = shape.global_channels;
  const bool are_rows = args.global.stride_column == Cg && args.global.stride_row == Wg * Cg &&
                        args.global.stride_batch == Hg * Wg * Cg;
  Acc* staged = static_cast<Acc*>(memory);
  const auto product = [&](int64_t first, int64_t count, int64_t from, int64_t to) {
    Matrix<const Acc> left{staged, layout.global};
    if (are_rows && is_left_operand<T>(Cg)) {
      const T* tokens = static_cast<const T*>(args.global.data) + first * Cg;
      left = {reinterpret_cast<const Acc*>(tokens), depth_of<T>(Cg)};
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (first + i) / Wg, column = (first + i) % Wg;
        stage(pixel_of<T>(args.global, row / Hg, row % Hg, column), Cg, staged + i * layout.global);
      }
    }
    Acc* mixed = static_cast<Acc*>(args.mixed) + first * layout.channels;
    multiply_panels<V, typename Products<T>::type>(count, layout.channels, depth_of<T>(Cg), left,
        static_cast<const Acc*>(args.packed_global), From<V>{}, To<V>{{mixed, layout.channels}},
        from, to);
  };
  for_each_product<V>(
      layout.global_tasks(shape), shape.global_tokens(), layout.channels, begin, end, product);
}

// Sums of pixels [first, …) of an output row start with the bias and the interpolated global half.
template <typename V, typename T, typename Acc = typename V::Acc>
struct Interpolated {
  const Acc* row;  // (Wg, channels), interpolated along the other axis
  const Acc* bias;
  int64_t channels, first;
  Taps taps;
  const T* residual;  // may be null
  int64_t residual_stride;
  const T* out;
  int64_t out_channels;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t pixel, int64_t column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const int64_t x = first + pixel + i;
      // The products take as long as memory takes to bring what they are finished with.
      if (residual != nullptr) {
        prefetch(residual + (pixel + i) * residual_stride + column, N * V::size);
      }
      prefetch(out + (pixel + i) * out_channels + column, N * V::size);
      const Acc* lower = row + taps.index[x] * channels + column;
      const Acc* upper = taps.fraction[x] > 0 ? lower + channels : lower;
      const V share = V::fill(static_cast<Acc>(taps.fraction[x]));
      const V rest = V::fill(static_cast<Acc>(1 - taps.fraction[x]));
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const V sum = fma(rest, V::load(lower + j * V::size), V::load(bias + column + j * V::size));
        sums[i][j] = fma(share, V::load(upper + j * V::size), sum);
      }
    }
  }
};

template <typename T>
void mix(const UpsampleForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const UpsampleShape& shape = args.shape;
  const UpsampleLayout layout(shape);
  const int64_t W = shape.width, H = shape.height, C = shape.channels;
  const int64_t Cl = shape.local_channels, coarse_row = shape.global_width * layout.channels;
  Scratch<Acc> scratch(memory);
  Acc* row = scratch.take(coarse_row);
  Acc* staged = scratch.take(UpsampleLayout::block * layout.local);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / H, y = task % H;
    const Acc* lower = static_cast<const Acc*>(args.mixed) +
                       (image * shape.global_height + args.rows.index[y]) * coarse_row;
    const Acc* interpolated = lower;
    if (args.rows.fraction[y] > 0) {
      const V share = V::fill(static_cast<Acc>(args.rows.fraction[y]));
      const V rest = V::fill(static_cast<Acc>(1 - args.rows.fraction[y]));
      for (int64_t c = 0; c < coarse_row; c += V::size) {
        fma(share, V::load(lower + coarse_row + c), rest * V::load(lower + c)).store(row + c);
      }
      interpolated = row;
    }
    const Acc factor =
        args.factors.data == nullptr ? Acc{1} : value_at<T, Acc>(args.factors, image);
    for (int64_t first = 0; first < W; first += UpsampleLayout::block) {
      const int64_t count = smaller(UpsampleLayout::block, W - first);
      const T* local = pixel_of<T>(args.local, image, y, first);
      Matrix<const Acc> left{staged, layout.local};
      if constexpr (sizeof(T) == sizeof(Acc)) {
        left = {local, args.local.stride_column};
      } else {
        for (int64_t i = 0; i < count; ++i) {
          stage(local + i * args.local.stride_column, Cl, staged + i * layout.local);
        }
      }
      const T* residual = nullptr;
      if (args.residual.data != nullptr) residual = pixel_of<T>(args.residual, image, y, first);
      T* out = static_cast<T*>(args.out) + (task * W + first) * C;
      const Interpolated<V, T> start{interpolated, static_cast<const Acc*>(args.bias_row),
          layout.channels, first, args.columns, residual, args.residual.stride_column, out, C};
      const Finished<V, T> finish{factor, residual, args.residual.stride_column, out, C};
      multiply_panels<V, typename Products<T>::type>(count, layout.channels, depth_of<T>(Cl), left,
          static_cast<const Acc*>(args.packed_local), start, finish);
    }
  }
}

template <typename T>
constexpr UpsampleForwardKernels kernels{pack<T>, mix_global<T>, mix<T>};

}  // namespace

DSNET_DEFINE_KERNELS(UpsampleForwardKernels, upsample_concat_forward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
