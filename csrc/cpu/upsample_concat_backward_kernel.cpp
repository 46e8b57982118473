// Upsampling, concatenation and mixing, backward; compiled once per instruction set.
//
// With G the output's gradient times the image's factor, U the interpolation and W = [W_l, W_g]:
//   dlocal = G·W_l    dW_l = Gᵀ·local    db = Σ G    dY = Uᵀ·G    dglobal = dY·W_g
//   dW_g = dYᵀ·global
// One pass over G gives the first four, in sums of each slot; the others are of the coarse grid.
// Where the processor multiplies pairs of bfloat16, dlocal and dW_l are formed of them: their
// factors are stored values. dY is a sum, which pairs would round before it is multiplied.
#include "attention_steps.h"
#include "scratch.h"
#include "storages.h"
#include "upsample_concat.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {
namespace {

// Columns [column, column + lanes) of a half of the weight, in its own order of rows.
template <typename T, bool pairs, typename Source>
void pack_half(const UpsampleBackward& args, const Source* weight, int64_t column, int64_t count,
    AccumulatorOf<T>* packed) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const int64_t rows = args.shape.channels, depth = pairs ? depth_of<T>(rows) : rows;
  for (int64_t j = column; j < column + lanes; j += V::size) {
    const Panel panel = panel_of<V>(j, padded(count));
    const int64_t n = smaller(V::size, count - j);
    Acc* to = packed + panel.first * depth + j - panel.first;
    const auto row = [&](int64_t i) {
      return n > 0 ? load_part<V>(weight + i * args.shape.weight_columns() + j, n) : V::zero();
    };
    for (int64_t k = 0; k < depth; ++k, to += panel.columns) {
      if constexpr (pairs) {
        Acc second[V::size];
        row(2 * k).store(to);
        if (2 * k + 1 < rows) row(2 * k + 1).store(second);
        pair_rows(to, 2 * k + 1 < rows ? second : nullptr, V::size);
      } else {
        row(k).store(to);
      }
    }
  }
}

template <typename T, bool pairs>
void pack_either(
    const UpsampleBackward& args, int64_t offset, int64_t column, int64_t count, void* packed) {
  using Acc = AccumulatorOf<T>;
  Acc* to = static_cast<Acc*>(packed);
  if (args.weight.is_accumulator) {
    const Acc* weight = static_cast<const Acc*>(args.weight.data) + offset;
    pack_half<T, pairs>(args, weight, column, count, to);
  } else {
    const T* weight = static_cast<const T*>(args.weight.data) + offset;
    pack_half<T, pairs>(args, weight, column, count, to);
  }
}

template <typename T>
void pack(const UpsampleBackward& args, void*, int64_t begin, int64_t end) {
  const int64_t Cl = args.shape.local_channels, local_tasks = padded(Cl) / lanes;
  for (int64_t task = begin; task < end; ++task) {
    if (task < local_tasks) {
      pack_either<T, Products<T>::pairs>(args, 0, task * lanes, Cl, args.packed_local);
    } else {
      pack_either<T, false>(
          args, Cl, (task - local_tasks) * lanes, args.shape.global_channels, args.packed_global);
    }
  }
}

// A token's channels, zero behind the last.
template <typename V, typename T, typename Acc = typename V::Acc>
void widen_padded(const T* from, int64_t count, Acc* to) {
  for (int64_t c = 0; c < padded(count); c += V::size) {
    const int64_t n = smaller(V::size, count - c);
    (n > 0 ? load_part<V>(from + c, n) : V::zero()).store(to + c);
  }
}

// Sums that are stored as rows of `channels` values.
template <typename V, typename T>
struct Stored {
  T* out;
  int64_t channels;

  template <int R, int N>
  __attribute__((always_inline)) void operator()(
      V (&sums)[R][N], int64_t row, int64_t column) const {
    const bool whole = column + N * V::size <= channels;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      T* to = out + (row + i) * channels + column;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const int64_t c = j * V::size, left = channels - column - c;
        if (whole) {
          sums[i][j].store(to + c);
        } else if (left > 0) {
          store_part(sums[i][j], to + c, smaller(V::size, left));
        }
      }
    }
  }
};

// One row of the gradient: G (W, channels); its sums, added to `bias`; its interpolation's adjoint
// along the row, `coarse` (Wg, channels). K registers of channels from `first` on.
template <typename V, int K, bool whole, typename T, typename Acc = typename V::Acc>
void take_channels(const UpsampleBackward& args, const T* grad, Acc factor, int64_t first, Acc* g,
    Acc* bias, Acc* coarse) {
  const int64_t stride = padded(args.shape.channels), left = args.shape.channels - first;
  const V scale = V::fill(factor);
  V sums[K], lower[K], upper[K];
  for (int k = 0; k < K; ++k) sums[k] = lower[k] = upper[k] = V::zero();
  for (int64_t j = 0; j < args.shape.global_width; ++j) {
    for (int64_t x = args.columns.begin[j]; x < args.columns.begin[j + 1]; ++x) {
      const T* from = grad + x * args.grad.stride_column + first;
      const V share = V::fill(static_cast<Acc>(args.columns.fraction[x]));
      const V rest = V::fill(static_cast<Acc>(1 - args.columns.fraction[x]));
      for (int k = 0; k < K; ++k) {
        V value;
        if constexpr (whole) {
          value = V::load(from + k * V::size);
        } else {
          const int64_t n = smaller(V::size, left - k * V::size);
          value = n > 0 ? load_part<V>(from + k * V::size, n) : V::zero();
        }
        value = value * scale;
        value.store(g + x * stride + first + k * V::size);
        sums[k] = sums[k] + value;
        lower[k] = fma(rest, value, lower[k]);
        upper[k] = fma(share, value, upper[k]);
      }
    }
    for (int k = 0; k < K; ++k) {
      lower[k].store(coarse + j * stride + first + k * V::size);
      lower[k] = upper[k];
      upper[k] = V::zero();
    }
  }
  for (int k = 0; k < K; ++k) {
    Acc* to = bias + first + k * V::size;
    (V::load(to) + sums[k]).store(to);
  }
}

template <typename V, typename T, typename Acc = typename V::Acc>
void take_row(
    const UpsampleBackward& args, const T* grad, Acc factor, Acc* g, Acc* bias, Acc* coarse) {
  constexpr int K = tile_registers == 3 ? 4 : 2;
  const int64_t C = args.shape.channels;
  int64_t first = 0;
  for (; first + K * V::size <= C; first += K * V::size) {
    take_channels<V, K, true>(args, grad, factor, first, g, bias, coarse);
  }
  for (; first < padded(C); first += V::size) {
    take_channels<V, 1, false>(args, grad, factor, first, g, bias, coarse);
  }
}

// to += share · from
template <typename V, typename Acc = typename V::Acc>
void add_share(Acc share, const Acc* from, int64_t count, Acc* to) {
  const V factor = V::fill(share);
  for (int64_t c = 0; c < count; c += V::size) {
    fma(factor, V::load(from + c), V::load(to + c)).store(to + c);
  }
}

// The lower of the coarse rows that a fine row takes from; rows of all images in order.
inline int64_t coarse_row_of(const UpsampleBackward& args, int64_t row) {
  const int64_t H = args.shape.height;
  return row / H * args.shape.global_height + args.rows.index[row % H];
}

// Where coarse row 0 of a slot's sums would lie: each slot has two rows to itself.
inline int64_t slot_offset(int64_t slot) { return 2 * slot; }

// Rows of G and of values as what is multiplied: pairs of channels in `left`, where the processor
// has them, and pairs of tokens in place, in every second row.
template <typename T, typename Acc = AccumulatorOf<T>>
void pair_chunk(int64_t tokens, Matrix<Acc> g, Matrix<Acc> values, Acc* left) {
  if constexpr (Products<T>::pairs) {
    copy_columns(tokens, g.stride, g.data, g.stride, left, g.stride);
    for (int64_t t = 0; t < tokens; ++t) pair_columns(left + t * g.stride, g.stride);
    const auto pair_tokens = [&](const Matrix<Acc>& all, int64_t t) {
      Acc* row = all.data + t * all.stride;
      pair_rows(row, t + 1 < tokens ? row + all.stride : nullptr, all.stride);
    };
    for (int64_t t = 0; t < tokens; t += 2) {
      pair_tokens(g, t);
      pair_tokens(values, t);
    }
  }
}

template <typename T>
void local_stream(const UpsampleBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const UpsampleShape& shape = args.shape;
  const UpsampleBackwardLayout& cut = args.cut;
  const UpsampleLayout layout(shape);
  const int64_t W = shape.width, H = shape.height, C = shape.channels;
  const int64_t Cl = shape.local_channels, coarse_row = shape.global_width * layout.channels;
  const int64_t tokens = cut.chunk_rows * W;
  Scratch<Acc> scratch(memory);
  Acc* g = scratch.take(tokens * layout.channels);
  Acc* values = scratch.take(tokens * layout.local);
  Acc* coarse = scratch.take(coarse_row);
  Acc* bias = scratch.take(layout.channels);
  constexpr bool pairs = Products<T>::pairs;
  using Product = typename Products<T>::type;
  Acc* left = pairs ? scratch.take(tokens * layout.channels) : g;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t first = slot * cut.slot_rows, last = smaller(first + cut.slot_rows, shape.rows());
    Acc* weight_sums = static_cast<Acc*>(args.weight_sums) + slot * C * layout.local;
    double* bias_sums = args.bias_sums + slot * layout.channels;
    Acc* coarse_sums = static_cast<Acc*>(args.coarse_sums) + slot_offset(slot) * coarse_row;
    // With the row after the last, whether or not a fraction is its.
    const int64_t sums_end = (coarse_row_of(args, last - 1) + 2) * coarse_row;
    for (int64_t i = coarse_row_of(args, first) * coarse_row; i < sums_end; i += V::size) {
      V::zero().store(coarse_sums + i);
    }
    for (int64_t c = 0; c < layout.channels; ++c) bias_sums[c] = 0;

    for (int64_t chunk = first; chunk < last; chunk += cut.chunk_rows) {
      const int64_t rows = smaller(cut.chunk_rows, last - chunk);
      for (int64_t c = 0; c < layout.channels; ++c) bias[c] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (chunk + r) / H, y = (chunk + r) % H;
        const Acc factor =
            args.factors.data == nullptr ? Acc{1} : value_at<T, Acc>(args.factors, image);
        take_row<V>(args, pixel_of<T>(args.grad, image, y, 0), factor, g + r * W * layout.channels,
            bias, coarse);
        Acc* sums = coarse_sums + coarse_row_of(args, chunk + r) * coarse_row;
        const double fraction = args.rows.fraction[y];
        add_share<V>(static_cast<Acc>(1 - fraction), coarse, coarse_row, sums);
        if (fraction > 0) {
          add_share<V>(static_cast<Acc>(fraction), coarse, coarse_row, sums + coarse_row);
        }
        for (int64_t x = 0; x < W; ++x) {
          widen_padded<V>(
              pixel_of<T>(args.local, image, y, x), Cl, values + (r * W + x) * layout.local);
        }
      }
      for (int64_t c = 0; c < C; ++c) bias_sums[c] += static_cast<double>(bias[c]);
      pair_chunk<T>(rows * W, {g, layout.channels}, {values, layout.local}, left);
      multiply_panels<V, Product>(rows * W, layout.local, depth_of<T>(C), {left, layout.channels},
          static_cast<const Acc*>(args.packed_local), From<V>{},
          Stored<V, T>{static_cast<T*>(args.grad_local) + chunk * W * Cl, Cl});
      constexpr int64_t step = pairs ? 2 : 1;
      multiply_with<true, V, Product>(C, layout.local, depth_of<T>(rows * W),
          {g, step * layout.channels}, {values, step * layout.local}, From<V>{},
          AddedTo<V>{{weight_sums, layout.local}, chunk == first});
    }
  }
}

// One row of the mixed global stream's gradient: sums of the slots whose rows take from it, in
// order.
template <typename T>
void add_slots(const UpsampleBackward& args, int64_t coarse, AccumulatorOf<T>* grad_mixed) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const UpsampleShape& shape = args.shape;
  const int64_t image = coarse / shape.global_height, j = coarse % shape.global_height;
  const int64_t stride = shape.global_width * padded(shape.channels);
  const int64_t first = image * shape.height + args.rows.begin[j > 0 ? j - 1 : 0];
  const int64_t last = image * shape.height + args.rows.begin[j + 1];
  const Acc* sums = static_cast<const Acc*>(args.coarse_sums) + coarse * stride;
  for (int64_t c = 0; c < stride; c += V::size) V::zero().store(grad_mixed + c);
  if (first == last) return;
  for (int64_t slot = first / args.cut.slot_rows; slot <= (last - 1) / args.cut.slot_rows; ++slot) {
    add_share<V>(Acc{1}, sums + slot_offset(slot) * stride, stride, grad_mixed);
  }
}

template <typename T>
void global_stream(const UpsampleBackward& args, void*, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  const UpsampleShape& shape = args.shape;
  const UpsampleLayout layout(shape);
  const int64_t Wg = shape.global_width, Hg = shape.global_height, Cg = shape.global_channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * args.cut.global_block_rows;
    const int64_t last = smaller(first + args.cut.global_block_rows, shape.global_rows());
    Acc* grad_mixed = static_cast<Acc*>(args.grad_mixed) + first * Wg * layout.channels;
    for (int64_t row = first; row < last; ++row) {
      add_slots<T>(args, row, grad_mixed + (row - first) * Wg * layout.channels);
      for (int64_t x = 0; x < Wg; ++x) {
        widen_padded<V>(pixel_of<T>(args.global, row / Hg, row % Hg, x), Cg,
            static_cast<Acc*>(args.global_values) + (row * Wg + x) * layout.global);
      }
    }
    multiply_panels<V>((last - first) * Wg, layout.global, shape.channels,
        {grad_mixed, layout.channels}, static_cast<const Acc*>(args.packed_global), From<V>{},
        Stored<V, T>{static_cast<T*>(args.grad_global) + first * Wg * Cg, Cg});
  }
}

// Rows of the weight's gradient and values of the bias's.
template <typename T>
void weights(const UpsampleBackward& args, void* memory, int64_t begin, int64_t end) {
  using V = typename Register<T>::type;
  using Acc = typename V::Acc;
  using Layout = UpsampleBackwardLayout;
  const UpsampleShape& shape = args.shape;
  const UpsampleLayout layout(shape);
  const int64_t C = shape.channels, Cl = shape.local_channels, all = shape.global_tokens();
  const int64_t stride = shape.weight_columns(), slots = args.cut.slots;
  Scratch<Acc> scratch(memory);
  Acc* columns = scratch.take(Layout::weight_depth * Layout::weight_block);
  Acc* sums = scratch.take(Layout::weight_block * layout.global);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task * Layout::weight_block;
    const int64_t rows = smaller(Layout::weight_block, C - row);
    Acc* out = static_cast<Acc*>(args.grad_weight) + row * stride;
    for (int64_t i = 0; i < rows; ++i) {
      const Acc* from = static_cast<const Acc*>(args.weight_sums) + (row + i) * layout.local;
      for_each_register<V>(Cl, [&](int64_t c, int64_t n) {
        V sum = V::load(from + c);
        for (int64_t slot = 1; slot < slots; ++slot) {
          sum = sum + V::load(from + slot * C * layout.local + c);
        }
        store_part(sum, out + i * stride + c, n);
      });
      double bias = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        bias += args.bias_sums[slot * layout.channels + row + i];
      }
      static_cast<Acc*>(args.grad_bias)[row + i] = static_cast<Acc>(bias);
    }

    for (int64_t first = 0; first < all; first += Layout::weight_depth) {
      const int64_t depth = smaller(Layout::weight_depth, all - first);
      const Acc* grad = static_cast<const Acc*>(args.grad_mixed) + first * layout.channels + row;
      copy_columns(depth, rows, grad, layout.channels, columns, Layout::weight_block);
      const Acc* values = static_cast<const Acc*>(args.global_values) + first * layout.global;
      multiply_with<true, V>(rows, layout.global, depth, {columns, Layout::weight_block},
          {values, layout.global}, From<V>{}, AddedTo<V>{{sums, layout.global}, first == 0});
    }
    copy_columns(rows, shape.global_channels, sums, layout.global, out + Cl, stride);
  }
}

template <typename T>
constexpr UpsampleBackwardKernels kernels{pack<T>, local_stream<T>, global_stream<T>, weights<T>};

}  // namespace

DSNET_DEFINE_KERNELS(UpsampleBackwardKernels, upsample_concat_backward, kernels)

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
