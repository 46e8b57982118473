// The block's MLP, forward; compiled once per instruction set.
#include "pointwise_mlp_steps.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Sums of the first product end as GELU's values, the right operand of the second.
template <typename V, typename T, typename Acc = typename V::Acc>
struct Activated {
  int64_t hidden, vector;
  T* kept;  // may be null
  Acc* panels;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    if (kept != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
          sums[i][j].store(kept + kept_index<V>(vector, hidden, row + i, column + j * V::size));
        }
      }
    }
    store_panel<V, T, R, N>(
        panels, hidden, row, column, [&](int i, int j) { return gelu(sums[i][j]); });
  }
};

// x + factor·branch for the tokens of a vector.
template <typename T, typename Acc = AccumulatorOf<T>>
void add_branch(const MlpForward& args, const Acc* rows, int64_t first, int64_t count) {
  using V = typename Register<T>::type;
  const int64_t C = args.shape.channels;
  for (int64_t i = 0; i < count; ++i) {
    const V factor = V::fill(factor_of<T>(args.factors, args.shape, first + i));
    const Acc* branch = rows + i * padded(C);
    const T* x = static_cast<const T*>(args.x.data) + (first + i) * args.x.stride;
    T* out = static_cast<T*>(args.out) + (first + i) * C;
    for_each_register<V>(C, [&](int64_t c, int64_t n) {
      store_part(fma(factor, V::load(branch + c), load_part<V>(x + c, n)), out + c, n);
    });
  }
}

template <typename T>
void run(const MlpForward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const MlpShape& shape = args.shape;
  const MlpLayout layout(shape);
  const int64_t C = shape.channels, R = shape.hidden;
  Scratch<Acc> scratch(memory);
  Acc* rows = scratch.take(lanes * layout.channels);
  Acc* panels = scratch.take(MlpLayout::block * layout.channels);
  Acc* activations = scratch.take(MlpLayout::block * layout.hidden);
  Acc* sums = scratch.take(MlpLayout::block * layout.channels);
  const Affine<V> affine{static_cast<const Acc*>(args.scale), static_cast<const Acc*>(args.shift)};
  const auto tokens_of = [&](int64_t vector) {
    return smaller(lanes, shape.tokens() - vector * lanes);
  };
  int64_t vectors;
  for (int64_t vector = begin; vector < end; vector += vectors) {
    vectors = next_vectors(end - vector);
    const int64_t columns = vectors * lanes;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = (vector + v) * lanes;
      token_rows<T>(args.x, first, tokens_of(vector + v), C, affine, rows);
      put_columns<V>(rows, C, v * lanes, columns, panels);
    }
    pair_panels<V, T>(C, columns, panels);
    multiply_panels<V, typename Products<T>::by_pairs>(R, columns, depth_of<T>(C),
        operand_of<T>(args.fc1), panels, FromBias<V>{static_cast<const Acc*>(args.fc1_bias)},
        Activated<V, T>{R, vector, static_cast<T*>(args.hidden), activations});
    multiply_panels<V, typename Products<T>::type>(C, columns, depth_of<T>(R),
        operand_of<T>(args.fc2), activations, FromBias<V>{static_cast<const Acc*>(args.fc2_bias)},
        To<V>{{sums, columns}});
    for (int64_t v = 0; v < vectors; ++v) {
      transpose(C, lanes, sums + v * lanes, columns, rows, layout.channels);
      add_branch<T>(args, rows, (vector + v) * lanes, tokens_of(vector + v));
    }
  }
}

template <typename T>
constexpr MlpForwardKernels kernels{Products<T>::pairs, stage<T>, run<T>};

}  // namespace

MlpForwardKernels pointwise_mlp_forward(Storage storage) {
  switch (storage) {
    case Storage::float32: return kernels<float>;
    case Storage::bfloat16: return kernels<bfloat16>;
    case Storage::float64: return kernels<double>;
  }
  return {};
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
