// Gradients of the block's MLP; compiled once per instruction set.
//
// Tokens are taken in chunks: a first step gives each vector's gradient of x and leaves in memory
// what the weights' gradients are products of; a second one sums those over the chunk, each task
// for rows of its own.
#include "pointwise_mlp_steps.h"
#include "storages.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// As what a row of a left operand over tokens is stored.
template <typename T, bool pairs = Products<T>::pairs>
struct Stored {
  using type = T;
};
template <typename T>
struct Stored<T, false> {
  using type = AccumulatorOf<T>;
};
template <typename T>
using Word = typename Stored<T>::type;

// Sums of factor·grad·W₂ end as the gradient before GELU: as rows beside GELU's values, and as the
// right operand of the next product.
template <typename V, typename T, typename Acc = typename V::Acc>
struct Differentiated {
  int64_t hidden, vector;
  const T* kept;  // null: `recomputed`
  Matrix<const Acc> recomputed;
  Acc *activations, *grads;  // rows of words, from the block's tokens on
  int64_t stride;            // of a row, in tokens
  Acc* panels;

  V before(int64_t row, int64_t column) const {
    return kept == nullptr ? V::load(recomputed.data + row * recomputed.stride + column)
                           : V::load(kept + kept_index<V>(vector, hidden, row, column));
  }

  static void put(Acc* words, int64_t index, V value) {
    if constexpr (Products<T>::pairs) {
      value.store_rounded(reinterpret_cast<T*>(words) + index);
    } else {
      value.store(words + index);
    }
  }

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const int64_t c = column + j * V::size, index = (row + i) * stride + c;
        V slope;
        put(activations, index, gelu(before(row + i, c), slope));
        sums[i][j] = sums[i][j] * slope;
        put(grads, index, sums[i][j]);
      }
    }
    store_panel<V, T, R, N>(panels, hidden, row, column, [&](int i, int j) { return sums[i][j]; });
  }
};

// A vector's tokens as rows of the right operand (chunk tokens, channels) in panels.
template <typename T, typename Acc = AccumulatorOf<T>>
void put_rows(Acc* rows, int64_t channels, int64_t token, int64_t tokens, Acc* panels) {
  using V = typename Register<T>::type;
  const int64_t stride = padded(channels);
  if constexpr (Products<T>::pairs) {
    for (int64_t i = 0; i < lanes; i += 2) {
      pair_rows(rows + i * stride, rows + (i + 1) * stride, stride);
      copy_columns(1, stride, rows + i * stride, 0, rows + i / 2 * stride, 0);
    }
  }
  int64_t width;
  for (int64_t first = 0; first < stride; first += width) {
    width = panel_of<V>(first, stride).columns;
    Acc* panel = panels + first * depth_of<T>(tokens) + depth_of<T>(token) * width;
    for (int64_t i = 0; i < depth_of<T>(lanes); ++i) {
      for (int64_t c = 0; c < width; c += V::size) {
        V::load(rows + i * stride + first + c).store(panel + i * width + c);
      }
    }
  }
}

// The gradient of x for the tokens of a vector, and their sums for the parameters of a channel.
template <typename T, typename Acc = AccumulatorOf<T>>
void add_grad(const MlpBackward& args, const Acc* branch, int64_t vector) {
  using V = typename Register<T>::type;
  const MlpLayout layout(args.shape);
  const int64_t C = args.shape.channels, first = vector * lanes;
  const int64_t count = smaller(lanes, args.shape.tokens() - first);
  const Acc* scale = static_cast<const Acc*>(args.scale);
  Acc* sums =
      static_cast<Acc*>(args.column_sums) + vector * MlpLayout::column_sums * layout.channels;
  Acc factors[lanes];
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = factor_of<T>(args.factors, args.shape, first + i);
  }
  for_each_register<V>(C, [&](int64_t c, int64_t n) {
    const V factor = scale == nullptr ? V::fill(1) : load_part<V>(scale + c, n);
    V by_scale = V::zero(), by_shift = V::zero(), by_bias = V::zero();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i;
      const T* x = static_cast<const T*>(args.x.data) + token * args.x.stride + c;
      const T* grad = static_cast<const T*>(args.grad.data) + token * args.grad.stride + c;
      const V from = V::load(branch + i * layout.channels + c), direct = load_part<V>(grad, n);
      store_part(fma(factor, from, direct), static_cast<T*>(args.grad_x) + token * C + c, n);
      by_scale = fma(from, load_part<V>(x, n), by_scale);
      by_shift = by_shift + from;
      by_bias = fma(V::fill(factors[i]), direct, by_bias);
    }
    by_scale.store(sums + c);
    by_shift.store(sums + layout.channels + c);
    by_bias.store(sums + 2 * layout.channels + c);
  });
}

template <typename T>
void tokens(const MlpBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const MlpShape& shape = args.shape;
  const MlpLayout layout(shape);
  const int64_t C = shape.channels, R = shape.hidden, all = layout.chunk_tokens();
  Scratch<Acc> scratch(memory);
  Acc* rows = scratch.take(lanes * layout.channels);
  Acc* paired = scratch.take(lanes * layout.channels);
  Acc* inputs = scratch.take(MlpLayout::block * layout.channels);
  Acc* grads = scratch.take(MlpLayout::block * layout.channels);
  Acc* recomputed = scratch.take(MlpLayout::block * layout.hidden);
  Acc* grad_hidden = scratch.take(MlpLayout::block * layout.hidden);
  Acc* sums = scratch.take(MlpLayout::block * layout.channels);
  const Affine<V> affine{static_cast<const Acc*>(args.scale), static_cast<const Acc*>(args.shift)};
  const auto weighted = [&](V grad, int64_t token, int64_t, int64_t) {
    return V::fill(factor_of<T>(args.factors, shape, token)) * grad;
  };
  int64_t vectors;
  for (int64_t task = begin; task < end; task += vectors) {
    vectors = next_vectors(end - task);
    const int64_t columns = vectors * lanes, vector = args.first + task;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = (vector + v) * lanes, inside = (task + v) * lanes;
      const int64_t count = smaller(lanes, shape.tokens() - first);
      token_rows<T>(args.grad, first, count, C, weighted, rows);
      put_columns<T>(rows, C, v * lanes, columns, paired, grads);
      put_rows<T>(rows, C, inside, all, static_cast<Acc*>(args.grads));
      token_rows<T>(args.x, first, count, C, affine, rows);
      if (args.hidden == nullptr) {
        put_columns<T>(rows, C, v * lanes, columns, paired, inputs);
      }
      put_rows<T>(rows, C, inside, all, static_cast<Acc*>(args.inputs));
    }
    if (args.hidden == nullptr) {
      multiply_panels<V, typename Products<T>::type>(R, columns, depth_of<T>(C),
          operand_of<T>(args.fc1), inputs, FromBias<V>{static_cast<const Acc*>(args.fc1_bias)},
          To<V>{{recomputed, columns}});
    }
    const int64_t token = depth_of<T>(task * lanes);
    multiply_panels<V, typename Products<T>::by_pairs>(R, columns, depth_of<T>(C),
        operand_of<T>(args.fc2_transposed), grads, From<V>{},
        Differentiated<V, T>{R, vector, static_cast<const T*>(args.hidden), {recomputed, columns},
            static_cast<Acc*>(args.activations) + token,
            static_cast<Acc*>(args.grad_hidden) + token, all, grad_hidden});
    multiply_panels_in_blocks<V, typename Products<T>::type>(C, columns, depth_of<T>(R),
        operand_of<T>(args.fc1_transposed), grad_hidden, From<V>{}, Matrix<Acc>{sums, columns});
    for (int64_t v = 0; v < vectors; ++v) {
      transpose(C, lanes, sums + v * lanes, columns, rows, layout.channels);
      add_grad<T>(args, rows, vector + v);
    }
  }
}

// sums (rows, channels) += left (rows, tokens) · right (tokens, channels) in panels.
template <typename T, typename Acc = AccumulatorOf<T>>
void add_product(const MlpBackward& args, int64_t row, int64_t rows, const void* left,
    const void* right, void* sums) {
  using V = typename Register<T>::type;
  const MlpLayout layout(args.shape);
  const int64_t channels = layout.channels, count = depth_of<T>(args.vectors * lanes);
  const int64_t stride = depth_of<T>(layout.chunk_tokens());
  constexpr int64_t most = depth_of<T>(MlpLayout::depth);
  const Acc* from = static_cast<const Acc*>(left) + row * stride;
  Acc* to = static_cast<Acc*>(sums) + row * channels;
  int64_t width;
  for (int64_t first = 0; first < channels; first += width) {
    width = panel_of<V>(first, channels).columns;
    const Acc* panel = static_cast<const Acc*>(right) + first * stride;
    for (int64_t k = 0; k < count; k += most) {
      multiply_with<false, V, typename Products<T>::type>(rows, width, smaller(most, count - k),
          {from + k, stride}, {panel + k * width, width}, From<V>{},
          AddedTo<V>{{to + first, channels}, args.first == 0 && k == 0});
    }
  }
}

template <typename T>
void weights(const MlpBackward& args, void*, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  const int64_t R = args.shape.hidden, stride = MlpLayout(args.shape).chunk_tokens();
  const int64_t last = smaller(end * MlpLayout::row_unit, R);
  int64_t rows;
  for (int64_t row = begin * MlpLayout::row_unit; row < last; row += rows) {
    rows = smaller(MlpLayout::row_block, last - row);
    add_product<T>(args, row, rows, args.activations, args.grads, args.fc2_sums);
    add_product<T>(args, row, rows, args.grad_hidden, args.inputs, args.fc1_sums);
    for (int64_t i = row; i < row + rows; ++i) {
      const auto* grads = static_cast<const Word<T>*>(args.grad_hidden) + i * stride;
      double total = args.first == 0 ? 0 : args.bias_sums[i];
      for (int64_t k = 0; k < args.vectors * lanes; k += MlpLayout::depth) {
        V sum = V::zero();
        const int64_t stop = smaller(k + MlpLayout::depth, args.vectors * lanes);
        for (int64_t t = k; t < stop; t += V::size) sum = sum + V::load(grads + t);
        total += static_cast<double>(sum_of(sum));
      }
      args.bias_sums[i] = total;
    }
  }
}

template <typename T>
void finish(const MlpBackward& args, void*, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<T>;
  const MlpLayout layout(args.shape);
  const int64_t C = args.shape.channels, R = args.shape.hidden, Cp = layout.channels;
  const Acc* columns = static_cast<const Acc*>(args.column_sums);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * lanes, count = smaller(lanes, C - first);
    const Acc* fc1 = static_cast<const Acc*>(args.fc1_sums) + first;
    const Acc* fc2 = static_cast<const Acc*>(args.fc2_sums) + first;
    copy_columns(R, count, fc1, Cp, static_cast<Acc*>(args.grad_fc1_weight) + first, C);
    transpose(R, count, fc2, Cp, static_cast<Acc*>(args.grad_fc2_weight) + first * R, R);
    double sums[MlpLayout::column_sums][lanes] = {};
    for (int64_t vector = 0; vector < layout.vectors; ++vector) {
      for (int64_t k = 0; k < MlpLayout::column_sums; ++k) {
        const Acc* from = columns + (vector * MlpLayout::column_sums + k) * Cp + first;
        for (int64_t c = 0; c < lanes; ++c) sums[k][c] += static_cast<double>(from[c]);
      }
    }
    void* out[] = {args.grad_scale, args.grad_shift, args.grad_fc2_bias};
    for (int64_t k = 0; k < MlpLayout::column_sums; ++k) {
      for (int64_t c = 0; c < count; ++c) {
        static_cast<Acc*>(out[k])[first + c] = static_cast<Acc>(sums[k][c]);
      }
    }
    for (int64_t r = R * task / (Cp / lanes); r < R * (task + 1) / (Cp / lanes); ++r) {
      static_cast<Acc*>(args.grad_fc1_bias)[r] = static_cast<Acc>(args.bias_sums[r]);
    }
  }
}

template <typename T>
constexpr MlpBackwardKernels kernels{
    Products<T>::pairs, stage<T>, tokens<T>, weights<T>, finish<T>};

}  // namespace

DSNET_DEFINE_KERNELS(MlpBackwardKernels, pointwise_mlp_backward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
