// Convolutions of patches and of samples, forward; compiled once per instruction set.
#include "packed_product_steps.h"
#include "patch_conv.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// A patch's pixels, row by row. Copied as bytes: products read the row as another type.
template <typename T>
void take_patch(const PatchConv& args, int64_t image, int64_t y, int64_t x, T* values) {
  const int64_t C = args.shape.channels, patch = args.shape.patch;
  for (int64_t i = 0; i < patch; ++i, values += patch * C) {
    const T* row = pixel_of<T>(args.x, image, y * patch + i, x * patch);
    if (args.stride_channel == 1 && args.x.stride_column == C) {
      __builtin_memcpy(values, row, static_cast<std::size_t>(patch * C) * sizeof(T));
      continue;
    }
    for (int64_t j = 0; j < patch; ++j, row += args.x.stride_column) {
      for (int64_t c = 0; c < C; ++c) {
        __builtin_memcpy(values + j * C + c, row + c * args.stride_channel, sizeof(T));
      }
    }
  }
}

// A bilinear sample, rounded as activations are.
template <typename T>
void take_sample(const PatchConv& args, int64_t image, int64_t y, int64_t x, T* values) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const Acc down = static_cast<Acc>(args.rows.fraction[y]);
  const Acc right = static_cast<Acc>(args.columns.fraction[x]);
  const T* corners[2][2];
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t j = 0; j < 2; ++j) {
      // The next position is there where it has a share.
      corners[i][j] = pixel_of<T>(args.x, image, args.rows.index[y] + (down > 0 ? i : 0),
          args.columns.index[x] + (right > 0 ? j : 0));
    }
  }
  const V lower = V::fill(down), upper = V::fill(Acc{1} - down);
  const V after = V::fill(right), before = V::fill(Acc{1} - right);
  for_each_register<V>(args.shape.channels, [&](int64_t c, int64_t n) {
    const auto between = [&](const T* const(&pixels)[2]) {
      return fma(after, load_part<V>(pixels[1] + c, n), before * load_part<V>(pixels[0] + c, n));
    };
    store_part(fma(lower, between(corners[1]), upper * between(corners[0])), values + c, n);
  });
}

// A token's inputs as a row of the left operand. `spare` is memory for as many T's.
template <typename T, typename Acc = AccumulatorOf<T>>
void take_token(const PatchConv& args, int64_t token, T* spare, Acc* row) {
  const PatchConvShape& shape = args.shape;
  const int64_t line = token / shape.width, x = token % shape.width;
  const int64_t image = line / shape.height, y = line % shape.height, depth = shape.depth();
  constexpr bool in_place = Products<T>::pairs || sizeof(T) == sizeof(Acc);
  if constexpr (Products<T>::pairs) row[depth_of<T>(depth) - 1] = 0;
  T* values = in_place ? reinterpret_cast<T*>(row) : spare;
  if (args.rows.index == nullptr) {
    take_patch(args, image, y, x, values);
  } else {
    take_sample(args, image, y, x, values);
  }
  if constexpr (!in_place) stage(values, depth, row);
}

template <typename T>
void gather(const PatchConv& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  for (int64_t token = begin; token < end; ++token) {
    take_token<T>(args, token, static_cast<T*>(memory),
        static_cast<Acc*>(args.gathered) + token * args.row());
  }
}

template <typename T>
void run(const PatchConv& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const PatchConvShape& shape = args.shape;
  const ProductTasks tasks = args.tasks();
  const int64_t depth = shape.depth(), columns = padded(shape.outputs), stride = args.row();
  Acc* staged = static_cast<Acc*>(memory);
  T* spare = reinterpret_cast<T*>(staged + tasks.block * stride);
  const auto product = [&](int64_t first, int64_t count, int64_t from, int64_t to) {
    Matrix<const Acc> left{staged, stride};
    if (args.gathered != nullptr) {
      left.data = static_cast<const Acc*>(args.gathered) + first * stride;
    } else if (args.is_tokens && is_left_operand<T>(depth)) {
      const T* tokens = static_cast<const T*>(args.x.data) + first * depth;
      left = {reinterpret_cast<const Acc*>(tokens), depth_of<T>(depth)};
    } else {
      for (int64_t i = 0; i < count; ++i) {
        take_token<T>(args, first + i, spare, staged + i * stride);
      }
    }
    T* out = static_cast<T*>(args.out) + first * shape.outputs;
    multiply_panels<V, typename Products<T>::type>(count, columns, depth_of<T>(depth), left,
        static_cast<const Acc*>(args.packed), From<V>{{static_cast<const Acc*>(args.bias_row), 0}},
        Finished<V, T>{Acc{1}, nullptr, 0, out, shape.outputs}, from, to);
  };
  for_each_product<V>(tasks, shape.tokens(), columns, begin, end, product);
}

template <typename T>
constexpr PatchConvKernels kernels{pack_weight<T>, gather<T>, run<T>};

}  // namespace

DSNET_DEFINE_KERNELS(PatchConvKernels, patch_conv, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
