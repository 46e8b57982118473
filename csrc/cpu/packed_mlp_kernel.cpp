// The block's MLP with packed weights, forward; compiled once per instruction set.
#include "gelu.h"
#include "packed_mlp.h"
#include "packed_product_steps.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Sums of the first product end as GELU's values, rows of the second's left operand.
template <typename V, typename T, typename Acc = typename V::Acc>
struct Activated {
  Acc* rows;
  int64_t stride;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t token, int64_t column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Acc* row = rows + (token + i) * stride;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const V value = gelu(sums[i][j]);
        if constexpr (Products<T>::pairs) {
          value.store_rounded(reinterpret_cast<T*>(row) + column + j * V::size);
        } else {
          value.store(row + column + j * V::size);
        }
      }
    }
  }
};

// GELU of the first product, of tokens [first, first + count), into rows at `activations`.
template <typename T, typename Acc = AccumulatorOf<T>>
void multiply_first(const PackedMlp& args, int64_t first, int64_t count, int64_t from, int64_t to,
    Acc* staged, Acc* activations) {
  using V = typename Register<T>::type;
  const int64_t C = args.shape.channels, stride = padded(C + 1);
  const T* x = static_cast<const T*>(args.x) + first * C;
  Matrix<const Acc> left{staged, stride};
  if (is_left_operand<T>(C)) {
    left = {reinterpret_cast<const Acc*>(x), depth_of<T>(C)};
  } else {
    for (int64_t i = 0; i < count; ++i) stage(x + i * C, C, staged + i * stride);
  }
  const int64_t hidden = padded(args.shape.hidden);
  multiply_panels<V, typename Products<T>::type>(count, hidden, depth_of<T>(C), left,
      static_cast<const Acc*>(args.fc1), From<V>{{static_cast<const Acc*>(args.fc1_bias), 0}},
      Activated<V, T>{activations, hidden}, from, to);
}

// The second product of these tokens, and the residual.
template <typename T, typename Acc = AccumulatorOf<T>>
void multiply_second(const PackedMlp& args, int64_t first, int64_t count, int64_t from, int64_t to,
    const Acc* activations) {
  using V = typename Register<T>::type;
  const int64_t C = args.shape.channels;
  const T* x = static_cast<const T*>(args.x) + first * C;
  T* out = static_cast<T*>(args.out) + first * C;
  multiply_panels<V, typename Products<T>::type>(count, padded(C), depth_of<T>(args.shape.hidden),
      {activations, padded(args.shape.hidden)}, static_cast<const Acc*>(args.fc2),
      From<V>{{static_cast<const Acc*>(args.fc2_bias), 0}}, Finished<V, T>{Acc{1}, x, C, out, C},
      from, to);
}

template <typename T>
void run(const PackedMlp& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const PackedMlpShape& shape = args.shape;
  const PackedMlpLayout layout(shape);
  const int64_t block = layout.blocks.block;
  Scratch<Acc> scratch(memory);
  Acc* staged = scratch.take(block * padded(shape.channels + 1));
  Acc* activations = scratch.take(block * layout.hidden);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t token = task * block, count = smaller(block, shape.tokens - token);
    multiply_first<T>(args, token, count, 0, layout.hidden, staged, activations);
    multiply_second<T>(args, token, count, 0, padded(shape.channels), activations);
  }
}

// The same in steps.

template <typename T>
void first(const PackedMlp& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const PackedMlpShape& shape = args.shape;
  const int64_t hidden = padded(shape.hidden);
  for_each_product<V>({shape.tokens, shape.hidden}, shape.tokens, hidden, begin, end,
      [&](int64_t token, int64_t count, int64_t from, int64_t to) {
        multiply_first<T>(args, token, count, from, to, static_cast<Acc*>(memory),
            static_cast<Acc*>(args.activations) + token * hidden);
      });
}

template <typename T>
void second(const PackedMlp& args, void*, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const PackedMlpShape& shape = args.shape;
  for_each_product<V>({shape.tokens, shape.channels}, shape.tokens, padded(shape.channels), begin,
      end, [&](int64_t token, int64_t count, int64_t from, int64_t to) {
        multiply_second<T>(args, token, count, from, to,
            static_cast<const Acc*>(args.activations) + token * padded(shape.hidden));
      });
}

template <typename T>
constexpr PackedMlpKernels kernels{run<T>, first<T>, second<T>};

}  // namespace

DSNET_DEFINE_KERNELS(PackedMlpKernels, packed_mlp, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
