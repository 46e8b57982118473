// Co-attention between the streams on the GPU: forward. To be included by one translation unit.
//
// Kernels: the local affine folded into the local projections; LayerNorm of the global tokens,
// their projections, those of the local tokens or the absorbed matrices; attention of the local
// queries; attention of the global queries, in splits that another kernel combines; output
// projections with the residuals. So the absorbed form reads the local stream as it is.
#pragma once

#include "cuda/co_attention_attend.cuh"
#include "cuda/co_attention_dense.cuh"

namespace dsnet::cuda {

// Hands out parts of a workspace, 16 bytes aligned; from null it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  void* bytes(int64_t count) {
    char* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += divide_up(count, 16) * 16;
    return part;
  }
  float* floats(int64_t count) {
    return static_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What the attention reads, in the workspace.
struct CoAttentionOperands {
  CoAttentionInputs inputs;  // without an affine: it is folded into the projections
  void* folded_weight;       // (3·dim, Cl), in float32 where absorbed
  float* folded_bias;        // (3·dim)
  void* normalized;          // (B, M, Cg), LayerNorm of the global tokens
  float* statistics;         // (B, M, 2), mean and 1 / deviation
  void* global_qkv;          // (B, M, 3·dim), in float32 where absorbed
  void* tokens;              // (B, N, padded Cl), the local tokens, or those as they are
  int64_t token_row;         // values from one to the next
  void* local_qkv;           // (B, N, 3·dim), projected
  void* absorbed[3];         // A, U and G, (h, B, M, columns)
  float* key_bias;           // a, (h, B, M)

  CoAttentionOperands(const CoAttentionShape& shape, const CoAttentionInputs& given,
      Storage storage, const CoAttentionLaunch& l, Carver& carver)
      : inputs(given) {
    const auto size = static_cast<int64_t>(bytes_of(storage));
    const int64_t weights = l.folds ? 3 * shape.width * shape.local_width : 0;
    folded_weight = carver.bytes(weights * (l.absorbed ? 4 : size));
    folded_bias = carver.floats(l.folds ? 3 * shape.width : 0);
    if (l.folds) {
      inputs.local_qkv_weight = {folded_weight, l.absorbed || size == 4};
      inputs.local_qkv_bias = {folded_bias, true};
      inputs.local_scale = inputs.local_shift = {};
    }
    const int64_t global_rows = shape.batch * shape.global_tokens;
    const int64_t local_rows = shape.batch * shape.local_tokens;
    normalized = carver.bytes(global_rows * shape.global_width * size);
    statistics = carver.floats(global_rows * 2);
    global_qkv = carver.bytes(global_rows * 3 * shape.width * (l.absorbed ? 4 : size));
    token_row = l.copies_tokens ? divide_up(shape.local_width, 8) * 8 : shape.local_width;
    tokens = l.copies_tokens ? carver.bytes(local_rows * token_row * size)
                             : const_cast<void*>(inputs.local);
    local_qkv = l.absorbed ? nullptr : carver.bytes(local_rows * 3 * shape.width * size);
    const int64_t absorbed_rows = l.absorbed ? shape.heads * global_rows : 0;
    for (void*& matrix : absorbed) matrix = carver.bytes(absorbed_rows * l.columns * size);
    key_bias = carver.floats(absorbed_rows);
  }
};

inline float logit_scale(int64_t head_dim) {
  return 1.0f / std::sqrt(static_cast<float>(head_dim));
}

// The parts of a (B, tokens, 3·dim) matrix: 0, 1 and 2 are queries, keys and values.
template <typename T>
Rows rows_of_qkv(const CoAttentionShape& shape, const void* qkv, int64_t tokens, int part) {
  return {static_cast<const T*>(qkv) + part * shape.width, tokens * 3 * shape.width, shape.head_dim,
      3 * shape.width};
}

// Of (h, B, M, columns).
inline Rows rows_of_heads(const CoAttentionShape& shape, const void* matrix, int64_t columns) {
  return {
      matrix, shape.global_tokens * columns, shape.batch * shape.global_tokens * columns, columns};
}

inline Rows rows_of_tokens(const CoAttentionShape& shape, const void* tokens, int64_t row) {
  return {tokens, shape.local_tokens * row, 0, row};
}

template <typename T>
Direction to_local(const CoAttentionShape& shape, const CoAttentionInputs& inputs,
    const CoAttentionOperands& operands, const CoAttentionLaunch& l) {
  const auto projected = [&](int part) {
    return rows_of_qkv<T>(shape, operands.global_qkv, shape.global_tokens, part);
  };
  const auto absorbed = [&](int i) {
    return rows_of_heads(shape, operands.absorbed[i], l.columns);
  };
  return {l.absorbed ? rows_of_tokens(shape, operands.tokens, operands.token_row)
                     : rows_of_qkv<T>(shape, operands.local_qkv, shape.local_tokens, 0),
      l.absorbed ? absorbed(0) : projected(1), l.absorbed ? absorbed(1) : projected(2),
      l.absorbed ? operands.key_bias : nullptr, shape.batch, static_cast<int>(shape.heads),
      static_cast<int>(shape.local_tokens), static_cast<int>(shape.global_tokens), l.columns,
      l.absorbed ? 1.0f : logit_scale(shape.head_dim), inputs.dropout, 0};
}

template <typename T>
Direction to_global(const CoAttentionShape& shape, const CoAttentionInputs& inputs,
    const CoAttentionOperands& operands, const CoAttentionLaunch& l) {
  const auto local = [&](int part) {
    return l.absorbed ? rows_of_tokens(shape, operands.tokens, operands.token_row)
                      : rows_of_qkv<T>(shape, operands.local_qkv, shape.local_tokens, part);
  };
  return {l.absorbed ? rows_of_heads(shape, operands.absorbed[2], l.columns)
                     : rows_of_qkv<T>(shape, operands.global_qkv, shape.global_tokens, 0),
      local(1), local(2), nullptr, shape.batch, static_cast<int>(shape.heads),
      static_cast<int>(shape.global_tokens), static_cast<int>(shape.local_tokens), l.columns,
      l.absorbed ? 1.0f : logit_scale(shape.head_dim), inputs.dropout,
      static_cast<int>(shape.heads)};
}

// Value (row, column) of W is at W[row·columns + column].
inline Linear linear(Parameter x, int64_t x_stride, Parameter weight, Parameter bias,
    const void* residual, void* out, bool out_is_float32, int64_t rows, int64_t depth,
    int64_t columns) {
  return {x, x_stride, weight, depth, 1, bias, residual, out, out_is_float32, rows,
      static_cast<int>(depth), static_cast<int>(columns)};
}

template <typename T>
void launch_pad(const void* x, int64_t rows, int64_t width, void* out, cudaStream_t stream) {
  const int64_t padded = divide_up(width, 8) * 8;
  const int64_t units = rows * padded * static_cast<int64_t>(sizeof(T)) / 16;
  launch("co_attention_pad", co_attention_pad<T>,
      {dim3{static_cast<unsigned>(divide_up(units, 256))}, dim3{256}}, stream,
      static_cast<const T*>(x), rows, static_cast<int>(width), static_cast<int>(padded),
      width % 8 == 0 && detail::is_attention_aligned(x), static_cast<T*>(out));
}

template <typename T, typename V>
void launch_fold(const CoAttentionShape& shape, const CoAttentionInputs& inputs,
    const CoAttentionOperands& operands, cudaStream_t stream) {
  launch("co_attention_fold", co_attention_fold<T, V>,
      {dim3{static_cast<unsigned>(divide_up(3 * shape.width, 4))}, dim3{128}}, stream,
      inputs.local_qkv_weight, inputs.local_qkv_bias, inputs.local_scale, inputs.local_shift,
      3 * shape.width, static_cast<int>(shape.local_width), static_cast<V*>(operands.folded_weight),
      operands.folded_bias);
}

// A product with rows of the float32 (B, M, 3·dim) matrix, each head's part of it.
inline SmallProduct product_of_qkv(
    const CoAttentionShape& shape, const CoAttentionOperands& operands, int part) {
  SmallProduct p{};
  p.x = static_cast<const float*>(operands.global_qkv) + part * shape.width;
  p.x_image = shape.global_tokens * 3 * shape.width;
  p.x_head = shape.head_dim;
  p.x_row = 3 * shape.width;
  p.depth = static_cast<int>(shape.head_dim);
  return p;
}

inline void set_result(
    SmallProduct& p, const Rows& to, bool is_float32, int64_t columns, int64_t out_columns) {
  p.out = const_cast<void*>(to.data);
  p.out_is_float32 = is_float32;
  p.out_image = to.image;
  p.out_head = to.head;
  p.out_row = to.row;
  p.columns = static_cast<int>(columns);
  p.out_columns = static_cast<int>(out_columns);
}

// Fills the operands from the inputs as they were given.
template <typename T>
void prepare(const CoAttentionShape& shape, const CoAttentionInputs& given,
    const CoAttentionOperands& operands, const CoAttentionLaunch& l, cudaStream_t stream) {
  constexpr bool is_float32 = sizeof(T) == 4;
  const CoAttentionInputs& inputs = operands.inputs;
  if (l.folds && l.absorbed) launch_fold<T, float>(shape, given, operands, stream);
  if (l.folds && !l.absorbed) launch_fold<T, T>(shape, given, operands, stream);
  const int64_t global_rows = shape.batch * shape.global_tokens;
  const int64_t local_rows = shape.batch * shape.local_tokens, width = shape.width;
  launch("co_attention_norm", co_attention_norm<T>,
      {dim3{static_cast<unsigned>(divide_up(global_rows, 4))}, dim3{128}}, stream,
      static_cast<const T*>(inputs.global), inputs.global_norm_weight, inputs.global_norm_bias,
      inputs.eps, global_rows, static_cast<int>(shape.global_width),
      static_cast<T*>(operands.normalized), operands.statistics);
  launch_linear<T>(
      linear({operands.normalized, is_float32}, shape.global_width, inputs.global_qkv_weight,
          inputs.global_qkv_bias, nullptr, operands.global_qkv, is_float32 || l.absorbed,
          global_rows, shape.global_width, 3 * width),
      stream);
  if (l.copies_tokens) {
    launch_pad<T>(inputs.local, local_rows, shape.local_width, operands.tokens, stream);
  }
  if (!l.absorbed) {
    launch_linear<T>(linear({operands.tokens, is_float32}, operands.token_row,
                         inputs.local_qkv_weight, inputs.local_qkv_bias, nullptr,
                         operands.local_qkv, is_float32, local_rows, shape.local_width, 3 * width),
        stream);
    return;
  }

  // A, U and G, then a.
  const float scale = logit_scale(shape.head_dim);
  const int64_t head_weights = shape.head_dim * shape.local_width;
  const int parts[3] = {1, 2, 0};
  for (int i = 0; i < 3; ++i) {
    SmallProduct p = product_of_qkv(shape, operands, parts[i]);
    if (i == 1) {
      p.y = inputs.local_proj_weight;
      p.y_head = shape.head_dim;
      p.y_depth = 1;
      p.y_column = width;
    } else {
      p.y = inputs.local_qkv_weight;
      p.y_first = i == 0 ? 0 : width * shape.local_width;
      p.y_head = head_weights;
      p.y_depth = shape.local_width;
      p.y_column = 1;
    }
    p.factor = i == 1 ? 1.0f : scale;
    set_result(p, rows_of_heads(shape, operands.absorbed[i], l.columns), is_float32,
        shape.local_width, l.columns);
    launch_small_product<T>(shape, p, stream);
  }
  SmallProduct p = product_of_qkv(shape, operands, 1);
  p.y = inputs.local_qkv_bias;
  p.y_head = shape.head_dim;
  p.y_depth = 1;
  p.factor = scale;
  set_result(p, rows_of_heads(shape, operands.key_bias, 1), true, 1, 1);
  launch_small_product<T>(shape, p, stream);
}

template <typename T>
void launch_local(
    const Direction& d, const LocalResult& r, const CoAttentionLaunch& l, cudaStream_t stream) {
  const int64_t blocks = d.batch * (l.absorbed ? 1 : d.heads) * l.local_tiles;
  with_head_tile(l.column_tile, [&](auto column_tile) {
    constexpr int tile = decltype(column_tile)::value;
    const Grid grid{dim3{static_cast<unsigned>(blocks)}, dim3{128},
        co_attention_bytes<T, tile>(1, pair_stages<T>, tile_rows<T, tile>)};
    const auto kernel =
        l.absorbed ? co_attention_local<T, tile, true> : co_attention_local<T, tile, false>;
    launch("co_attention_local", kernel, grid, stream, d, r, l);
  });
}

// Partial sums of the global queries, and where their sums go.
struct GlobalResult {
  float* partials;  // (splits, B, h, M, 4 + columns)
  float* softmax;   // (B, h, M, 2) or null
  float* kept;      // (h, B, M), the sums of what dropout keeps of the weights, or null
  Rows out;         // of float32
};

template <typename T>
void launch_global(
    const Direction& d, const GlobalResult& r, const CoAttentionLaunch& l, cudaStream_t stream) {
  const int64_t blocks = d.batch * d.heads * l.global_tiles * l.splits;
  with_head_tile(l.column_tile, [&](auto column_tile) {
    constexpr int tile = decltype(column_tile)::value;
    launch("co_attention_global", co_attention_global<T, tile>,
        {dim3{static_cast<unsigned>(blocks)}, dim3{128},
            co_attention_bytes<T, tile>(1, pair_stages<T>, tile_rows<T, tile>)},
        stream, d, l, r.partials);
  });
  const int64_t rows = d.batch * d.heads * d.query_count;
  launch("co_attention_combine", co_attention_combine<>,
      {dim3{static_cast<unsigned>(divide_up(rows, 4))}, dim3{128}}, stream, d, l.splits,
      static_cast<const float*>(r.partials), r.softmax,
      static_cast<float*>(const_cast<void*>(r.out.data)), r.out.image, r.out.head, r.out.row,
      r.kept);
}

inline int64_t global_partials(const CoAttentionShape& shape, const CoAttentionLaunch& l) {
  return l.splits * shape.batch * shape.heads * shape.global_tokens * (partial_head + l.columns);
}

// What the forward has beyond the operands.
struct CoAttentionForwardParts {
  Carver carver;
  CoAttentionOperands operands;
  void* to_local;      // (B, N, dim), projected: what the local queries attended to
  float* partials;     // of the global queries
  float* unprojected;  // (h, B, M, columns), absorbed: what the global queries attended to
  float* kept;         // (h, B, M)

  CoAttentionForwardParts(
      const CoAttentionForward& args, Storage storage, const CoAttentionLaunch& l)
      : carver(args.workspace), operands(args.shape, args.inputs, storage, l, carver) {
    const CoAttentionShape& shape = args.shape;
    const int64_t rows = shape.heads * shape.batch * shape.global_tokens;
    const auto size = static_cast<int64_t>(bytes_of(storage));
    to_local = carver.bytes(l.absorbed ? 0 : shape.batch * shape.local_tokens * shape.width * size);
    partials = carver.floats(global_partials(shape, l));
    unprojected = carver.floats(l.absorbed ? rows * l.columns : 0);
    kept = carver.floats(l.absorbed ? rows : 0);
  }
};

inline Rows rows_of_attended(const CoAttentionShape& shape, const float* attended) {
  return {attended, shape.global_tokens * shape.width, shape.head_dim, shape.width};
}

template <typename T>
void co_attention_forward_of(
    const CoAttentionForward& args, const CoAttentionLaunch& l, cudaStream_t stream) {
  constexpr bool is_float32 = sizeof(T) == 4;
  constexpr Storage storage = storage_of<T>;
  const CoAttentionShape& shape = args.shape;
  const CoAttentionForwardParts parts(args, storage, l);
  const CoAttentionOperands& operands = parts.operands;
  const CoAttentionInputs& inputs = operands.inputs;
  prepare<T>(shape, args.inputs, operands, l, stream);

  LocalResult local{};
  local.softmax = args.local_softmax;
  local.out = l.absorbed ? args.out_local : parts.to_local;
  local.out_columns = static_cast<int>(l.absorbed ? shape.local_width : shape.width);
  local.packed = l.packed;
  if (l.absorbed) {
    local.residual = inputs.local;
    local.bias = inputs.local_proj_bias;
  }
  launch_local<T>(to_local<T>(shape, inputs, operands, l), local, l, stream);
  if (!l.absorbed) {
    launch_linear<T>(linear({parts.to_local, is_float32}, shape.width, inputs.local_proj_weight,
                         inputs.local_proj_bias, inputs.local, args.out_local, is_float32,
                         shape.batch * shape.local_tokens, shape.width, shape.local_width),
        stream);
  }

  const Rows attended = rows_of_attended(shape, args.attended);
  const Rows unprojected = rows_of_heads(shape, parts.unprojected, l.columns);
  launch_global<T>(to_global<T>(shape, inputs, operands, l),
      {parts.partials, args.global_softmax, l.absorbed ? parts.kept : nullptr,
          l.absorbed ? unprojected : attended},
      l, stream);
  if (l.absorbed) {
    SmallProduct p{};
    p.x = parts.unprojected;
    p.x_image = unprojected.image;
    p.x_head = unprojected.head;
    p.x_row = unprojected.row;
    p.y = inputs.local_qkv_weight;
    p.y_first = 2 * shape.width * shape.local_width;
    p.y_head = shape.head_dim * shape.local_width;
    p.y_depth = 1;
    p.y_column = shape.local_width;
    p.row = parts.kept;
    p.bias = inputs.local_qkv_bias;
    p.bias_first = 2 * shape.width;
    p.bias_head = shape.head_dim;
    p.factor = 1;
    p.depth = static_cast<int>(shape.local_width);
    set_result(p, attended, true, shape.head_dim, shape.head_dim);
    launch_small_product<T>(shape, p, stream);
  }
  launch_linear<T>(linear({args.attended, true}, shape.width, inputs.global_proj_weight,
                       inputs.global_proj_bias, inputs.global, args.out_global, is_float32,
                       shape.batch * shape.global_tokens, shape.width, shape.global_width),
      stream);
}

// Launches that the backward shares: compiled once, by co_attention.cu and co_attention_global.cu.
#define DSNET_CO_ATTENTION_LAUNCHES(declared, T)                                            \
  declared template void launch_pad<T>(const void*, int64_t, int64_t, void*, cudaStream_t); \
  declared template void launch_linear<T>(const Linear&, cudaStream_t);                     \
  declared template void launch_small_product<T>(                                           \
      const CoAttentionShape&, const SmallProduct&, cudaStream_t);                          \
  declared template void prepare<T>(const CoAttentionShape&, const CoAttentionInputs&,      \
      const CoAttentionOperands&, const CoAttentionLaunch&, cudaStream_t);                  \
  declared template void launch_local<T>(                                                   \
      const Direction&, const LocalResult&, const CoAttentionLaunch&, cudaStream_t)
#define DSNET_CO_ATTENTION_GLOBAL(declared, T) \
  declared template void launch_global<T>(     \
      const Direction&, const GlobalResult&, const CoAttentionLaunch&, cudaStream_t)

DSNET_CO_ATTENTION_LAUNCHES(extern, float);
DSNET_CO_ATTENTION_LAUNCHES(extern, __nv_bfloat16);
DSNET_CO_ATTENTION_LAUNCHES(extern, __half);
DSNET_CO_ATTENTION_GLOBAL(extern, float);
DSNET_CO_ATTENTION_GLOBAL(extern, __nv_bfloat16);
DSNET_CO_ATTENTION_GLOBAL(extern, __half);

}  // namespace dsnet::cuda
