// The block's MLP, forward; compiled once per instruction set.
//
// With many tokens a task has tokens of its own, whose hidden activations stay in its core's cache.
// With few, threads share the tokens and each has rows of the weights, in two steps.
#include "pointwise_mlp_steps.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Sums of the first product end as GELU's values, the right operand of the second.
template <typename V, typename T, typename Acc = typename V::Acc>
struct Activated {
  int64_t hidden, vector, first;  // first: what rows are counted from
  T* kept;                        // may be null
  Acc* panels;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t from, int64_t column) const {
    const int64_t row = first + from;
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

// A vector's tokens as columns of the first product's right operand.
template <typename T, typename Acc = AccumulatorOf<T>>
void put_vector(const MlpForward& args, int64_t vector, int64_t column, int64_t columns, Acc* rows,
    Acc* panels) {
  const Affine<typename Register<T>::type> affine{
      static_cast<const Acc*>(args.scale), static_cast<const Acc*>(args.shift)};
  const int64_t first = vector * lanes;
  token_rows<T>(args.x, first, smaller(lanes, args.shape.tokens() - first), args.shape.channels,
      affine, rows);
  put_columns<T>(rows, args.shape.channels, column, columns, rows, panels);
}

// Rows [row, row + rows) of the first product for `columns` tokens from a vector on.
template <typename T, typename Acc = AccumulatorOf<T>>
void multiply_first(const MlpForward& args, int64_t row, int64_t rows, int64_t vector,
    int64_t columns, const Acc* panels, Acc* activations) {
  using V = typename Register<T>::type;
  const Matrix<const Acc> weight = operand_of<T>(args.fc1);
  multiply_panels<V, typename Products<T>::by_pairs>(rows, columns,
      depth_of<T>(args.shape.channels), {weight.data + row * weight.stride, weight.stride}, panels,
      FromBias<V>{static_cast<const Acc*>(args.fc1_bias) + row},
      Activated<V, T>{args.shape.hidden, vector, row, static_cast<T*>(args.hidden), activations});
}

// The same of the second product.
template <typename T, typename Acc = AccumulatorOf<T>>
void multiply_second(const MlpForward& args, int64_t row, int64_t rows, int64_t columns,
    const Acc* activations, Acc* sums) {
  using V = typename Register<T>::type;
  const Matrix<const Acc> weight = operand_of<T>(args.fc2);
  multiply_panels_in_blocks<V, typename Products<T>::type>(rows, columns,
      depth_of<T>(args.shape.hidden), {weight.data + row * weight.stride, weight.stride},
      activations, FromBias<V>{static_cast<const Acc*>(args.fc2_bias) + row},
      Matrix<Acc>{sums + row * columns, columns});
}

// Columns of the second product's sums as the tokens of a vector.
template <typename T, typename Acc = AccumulatorOf<T>>
void take_vector(
    const MlpForward& args, int64_t vector, const Acc* sums, int64_t columns, Acc* rows) {
  const int64_t C = args.shape.channels, first = vector * lanes;
  transpose(C, lanes, sums, columns, rows, padded(C));
  add_branch<T>(args, rows, first, smaller(lanes, args.shape.tokens() - first));
}

template <typename T>
void run(const MlpForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const MlpShape& shape = args.shape;
  const MlpLayout layout(shape);
  Scratch<Acc> scratch(memory);
  Acc* rows = scratch.take(lanes * layout.channels);
  Acc* panels = scratch.take(MlpLayout::block * layout.channels);
  Acc* activations = scratch.take(MlpLayout::block * layout.hidden);
  Acc* sums = scratch.take(MlpLayout::block * layout.channels);
  int64_t vectors;
  for (int64_t vector = begin; vector < end; vector += vectors) {
    vectors = next_vectors(end - vector);
    const int64_t columns = vectors * lanes;
    for (int64_t v = 0; v < vectors; ++v) {
      put_vector<T>(args, vector + v, v * lanes, columns, rows, panels);
    }
    multiply_first<T>(args, 0, shape.hidden, vector, columns, panels, activations);
    multiply_second<T>(args, 0, shape.channels, columns, activations, sums);
    for (int64_t v = 0; v < vectors; ++v) {
      take_vector<T>(args, vector + v, sums + v * lanes, columns, rows);
    }
  }
}

// The same in steps, of all tokens.

template <typename T>
void put(const MlpForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const int64_t columns = MlpLayout(args.shape).vectors * lanes;
  for (int64_t vector = begin; vector < end; ++vector) {
    put_vector<T>(args, vector, vector * lanes, columns, static_cast<Acc*>(memory),
        static_cast<Acc*>(args.panels));
  }
}

// Calls body(row, rows) for the rows of these tasks, as many at a time as stay in cache.
template <typename Body>
void for_shared_rows(int64_t begin, int64_t end, int64_t all, const Body& body) {
  constexpr int64_t block = 6 * MlpLayout::shared_rows;
  const int64_t last = smaller(end * MlpLayout::shared_rows, all);
  for (int64_t row = begin * MlpLayout::shared_rows; row < last; row += block) {
    body(row, smaller(block, last - row));
  }
}

template <typename T>
void first(const MlpForward& args, void*, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const int64_t columns = MlpLayout(args.shape).vectors * lanes;
  for_shared_rows(begin, end, args.shape.hidden, [&](int64_t row, int64_t rows) {
    multiply_first<T>(args, row, rows, 0, columns, static_cast<const Acc*>(args.panels),
        static_cast<Acc*>(args.activations));
  });
}

template <typename T>
void second(const MlpForward& args, void*, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const int64_t columns = MlpLayout(args.shape).vectors * lanes;
  for_shared_rows(begin, end, args.shape.channels, [&](int64_t row, int64_t rows) {
    multiply_second<T>(args, row, rows, columns, static_cast<const Acc*>(args.activations),
        static_cast<Acc*>(args.sums));
  });
}

template <typename T>
void take(const MlpForward& args, void* memory, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const int64_t columns = MlpLayout(args.shape).vectors * lanes;
  for (int64_t vector = begin; vector < end; ++vector) {
    take_vector<T>(args, vector, static_cast<const Acc*>(args.sums) + vector * lanes, columns,
        static_cast<Acc*>(memory));
  }
}

template <typename T>
constexpr MlpForwardKernels kernels{
    Products<T>::pairs, stage<T>, run<T>, put<T>, first<T>, second<T>, take<T>};

}  // namespace

DSNET_DEFINE_KERNELS(MlpForwardKernels, pointwise_mlp_forward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
