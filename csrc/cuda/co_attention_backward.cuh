// Co-attention between the streams on the GPU: backward. To be included by one translation unit.
//
// What the attention reads is computed again. The local queries attend once more, for δ and what
// their output projection has read, and so have their softmax again; absorbed, so do the global
// ones. Then the gradients of queries, keys and values in both directions, of absorbed matrices or
// projections, and of the tokens. The weights' gradients are sums over all tokens, left to dense
// products; those of the local affine follow from the gradients of what it is folded into.
#pragma once

#include "cuda/co_attention.cuh"
#include "cuda/co_attention_scores.cuh"
#include "cuda/co_attention_sums.cuh"

namespace dsnet::cuda {

// What the backward has beyond the operands.
struct CoAttentionBackwardParts {
  Carver carver;
  CoAttentionOperands operands;
  void* grad_to_local;   // gradients of the local queries' results: (B, N, dim), or (B, N, columns)
  void* grad_to_global;  // of the global queries' results: (B, M, dim), or dR (h, B, M, columns)
  float* grad_attended;  // (B, M, dim), absorbed
  float* constants;      // (h, B, M), absorbed: grad_attended·b_v
  float* unprojected;    // R, (h, B, M, columns), absorbed
  float* kept;           // (h, B, M), absorbed
  float* zero;           // (h, B, M), absorbed: gradient of a constant of a query's logits
  void* to_local;        // (B, N, dim), projected
  float *local_facts, *global_facts;  // (B, h, N, 4) and (B, h, M, 4)
  float* partials;                    // of sums over local tokens
  float* bias_partials;               // (splits, h, B, M), absorbed
  void* grad_local_qkv;               // (B, N, 3·dim), projected
  void* grad_queries;                 // (B, N, columns), absorbed: of the local tokens as queries
  void* grad_tokens;                  // (B, N, columns), absorbed and copied
  float* grad_folded_weight;  // (3·dim, Cl), of the projections that the affine is folded in
  float* grad_folded_bias;    // (3·dim)
  float* grad_absorbed;       // dA/√d, dU and dG/√d, (3, h, B, M, columns)
  float* grad_key_bias;       // da/√d, (h, B, M)
  void* grad_global_qkv;      // (B, M, 3·dim)
  void* grad_normalized;      // (B, M, Cg)
  void* attended;             // (B, M, dim) in the storage of the streams
  float* slot_partials;       // (2, slots, the widest sum)

  CoAttentionBackwardParts(
      const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l)
      : carver(args.workspace), operands(args.shape, args.inputs, storage, l, carver) {
    const CoAttentionShape& shape = args.shape;
    const auto size = static_cast<int64_t>(bytes_of(storage));
    const int64_t local_rows = shape.batch * shape.local_tokens;
    const int64_t global_rows = shape.batch * shape.global_tokens;
    const int64_t absorbed_rows = l.absorbed ? shape.heads * global_rows : 0;
    const int64_t matrix = absorbed_rows * l.columns;
    const int64_t projected_rows = l.absorbed ? 0 : local_rows;
    grad_to_local = l.absorbed && !l.copies_grad
                        ? const_cast<void*>(args.grad_local)
                        : carver.bytes(local_rows * (l.absorbed ? l.columns : shape.width) * size);
    grad_to_global = carver.bytes((l.absorbed ? matrix : global_rows * shape.width) * size);
    grad_attended = carver.floats(l.absorbed ? global_rows * shape.width : 0);
    constants = carver.floats(absorbed_rows);
    unprojected = carver.floats(matrix);
    kept = carver.floats(absorbed_rows);
    zero = carver.floats(absorbed_rows);
    to_local = carver.bytes(projected_rows * shape.width * size);
    local_facts = carver.floats(local_rows * shape.heads * 4);
    global_facts = carver.floats(global_rows * shape.heads * 4);
    const int64_t sums = l.absorbed ? 3 * matrix : global_rows * 3 * shape.width;
    partials = carver.floats(std::max(l.splits * sums, l.absorbed ? global_partials(shape, l) : 0));
    bias_partials = carver.floats(l.splits * absorbed_rows);
    grad_local_qkv = carver.bytes(projected_rows * 3 * shape.width * size);
    grad_queries = carver.bytes(l.absorbed ? local_rows * l.columns * size : 0);
    grad_tokens = carver.bytes(writes_stream(l) ? 0 : local_rows * l.columns * size);
    grad_folded_weight = carver.floats(3 * shape.width * shape.local_width);
    grad_folded_bias = carver.floats(3 * shape.width);
    grad_absorbed = carver.floats(3 * matrix);
    grad_key_bias = carver.floats(absorbed_rows);
    grad_global_qkv = carver.bytes(global_rows * 3 * shape.width * size);
    grad_normalized = carver.bytes(global_rows * shape.global_width * size);
    attended = carver.bytes(global_rows * shape.width * size);
    slot_partials = carver.floats(
        2 * l.slots * std::max({3 * shape.width, shape.local_width, shape.global_width}));
  }

  // Whether the local stream's gradient is written by what computes it.
  static bool writes_stream(const CoAttentionLaunch& l) { return !l.absorbed || l.packed; }
};

// out = x·W over rows; value (k, column) of W is at W[k·columns + column].
inline Linear linear_transposed(Parameter x, Parameter weight, void* out, bool out_is_float32,
    int64_t rows, int64_t depth, int64_t columns) {
  return {x, depth, weight, 1, columns, {}, nullptr, out, out_is_float32, rows,
      static_cast<int>(depth), static_cast<int>(columns)};
}

// Rows of the partial sums: (splits, B, M, 3·dim), or (splits, 3, h, B, M, columns).
inline ResultRows partial_rows(
    const CoAttentionShape& shape, const CoAttentionLaunch& l, float* partials, int part) {
  const int64_t global_rows = shape.batch * shape.global_tokens;
  if (!l.absorbed) {
    return {partials + part * shape.width, global_rows * 3 * shape.width,
        shape.global_tokens * 3 * shape.width, shape.head_dim, 3 * shape.width};
  }
  const int64_t matrix = shape.heads * global_rows * l.columns;
  return {partials + part * matrix, 3 * matrix, shape.global_tokens * l.columns,
      global_rows * l.columns, l.columns};
}

inline ResultRows result_rows(const Rows& rows) {
  return {const_cast<void*>(rows.data), 0, rows.image, rows.head, rows.row};
}

template <typename T>
void launch_backward_queries(bool is_local, const Direction& d, const DirectionGradients& g,
    const CoAttentionLaunch& l, const ResultRows& result, cudaStream_t stream) {
  const int64_t blocks =
      is_local ? (g.sums_heads ? 1 : d.heads) * l.local_tiles : d.heads * l.global_tiles * l.splits;
  with_head_tile(l.column_tile, [&](auto column_tile) {
    constexpr int tile = decltype(column_tile)::value;
    launch("co_attention_backward_queries", co_attention_backward_queries<T, tile>,
        {dim3{static_cast<unsigned>(d.batch * blocks)}, dim3{128},
            co_attention_bytes<T, tile>(2, pair_stages<T>, tile_rows<T, tile>)},
        stream, d, g, l, result, is_local);
  });
}

template <typename T, bool is_merged>
void launch_backward_keys(bool is_local, const Direction& d, const DirectionGradients& g,
    const CoAttentionLaunch& l, const KeyResult& result, cudaStream_t stream) {
  const int64_t blocks =
      is_local ? (is_merged ? 1 : d.heads) * l.local_tiles : d.heads * l.global_tiles * l.splits;
  with_head_tile(l.column_tile, [&](auto column_tile) {
    constexpr int tile = decltype(column_tile)::value, parts = is_merged ? 1 : key_parts<tile>;
    launch("co_attention_backward_keys", co_attention_backward_keys<T, tile, is_merged>,
        {dim3{static_cast<unsigned>(d.batch * blocks * parts)}, dim3{128},
            co_attention_bytes<T, tile>(2, pair_stages<T>, queries_of_tile<T, tile>)},
        stream, d, g, l, result, is_local);
  });
}

// Compiled by co_attention_backward_keys.cu.
#define DSNET_CO_ATTENTION_BACKWARD_KEYS(declared, T)                                       \
  declared template void launch_backward_keys<T, false>(bool, const Direction&,             \
      const DirectionGradients&, const CoAttentionLaunch&, const KeyResult&, cudaStream_t); \
  declared template void launch_backward_keys<T, true>(bool, const Direction&,              \
      const DirectionGradients&, const CoAttentionLaunch&, const KeyResult&, cudaStream_t)

DSNET_CO_ATTENTION_BACKWARD_KEYS(extern, float);
DSNET_CO_ATTENTION_BACKWARD_KEYS(extern, __nv_bfloat16);
DSNET_CO_ATTENTION_BACKWARD_KEYS(extern, __half);

// The gradients of global tokens' queries, keys and values from those of A, U, G and a.
template <typename T>
void backward_of_absorbed(const CoAttentionShape& shape, const CoAttentionInputs& inputs,
    const CoAttentionBackwardParts& parts, const CoAttentionLaunch& l, cudaStream_t stream) {
  const int64_t matrix = shape.heads * shape.batch * shape.global_tokens * l.columns;
  const int64_t head_weights = shape.head_dim * shape.local_width;
  const int source[3] = {2, 0, 1};
  for (int part = 0; part < 3; ++part) {
    const Rows from = rows_of_heads(shape, parts.grad_absorbed + source[part] * matrix, l.columns);
    SmallProduct p{};
    p.x = static_cast<const float*>(from.data);
    p.x_image = from.image;
    p.x_head = from.head;
    p.x_row = from.row;
    if (part == 2) {
      p.y = inputs.local_proj_weight;
      p.y_head = shape.head_dim;
      p.y_depth = shape.width;
      p.y_column = 1;
    } else {
      p.y = inputs.local_qkv_weight;
      p.y_first = part == 0 ? shape.width * shape.local_width : 0;
      p.y_head = head_weights;
      p.y_depth = 1;
      p.y_column = shape.local_width;
    }
    if (part == 1) {
      p.row = parts.grad_key_bias;
      p.bias = inputs.local_qkv_bias;
      p.bias_head = shape.head_dim;
    }
    p.factor = 1;
    p.depth = static_cast<int>(shape.local_width);
    set_result(p, rows_of_qkv<T>(shape, parts.grad_global_qkv, shape.global_tokens, part),
        sizeof(T) == 4, shape.head_dim, shape.head_dim);
    launch_small_product<T>(shape, p, stream);
  }
}

// Sums over the rows of `matrix`: with x those of matrix·unit in front.
inline void launch_column_sums(Storage storage, const void* matrix, const void* x,
    const float* statistics, int64_t rows, int64_t columns, const CoAttentionLaunch& l,
    float* partials, float* sums, cudaStream_t stream) {
  const int64_t slot_rows = std::max<int64_t>(64, divide_up(rows, l.slots));
  const int64_t slots = divide_up(rows, slot_rows);
  column_sums(storage, {matrix, x, statistics, rows, columns, slots, slot_rows, partials}, stream);
  for (int i = 0; i < (x != nullptr ? 2 : 1); ++i) {
    sum_slots(partials + i * slots * columns, slots, columns, sums + i * columns, stream);
  }
}

// The gradients of the global tokens, of their LayerNorm and of the biases.
template <typename T>
void backward_of_tokens(const CoAttentionBackward& args, const CoAttentionBackwardParts& parts,
    const CoAttentionLaunch& l, cudaStream_t stream) {
  constexpr bool is_float32 = sizeof(T) == 4;
  const CoAttentionShape& shape = args.shape;
  const CoAttentionInputs& inputs = parts.operands.inputs;
  const ParameterOffsets offsets(shape);
  const int64_t global_rows = shape.batch * shape.global_tokens;
  const int64_t local_rows = shape.batch * shape.local_tokens;
  launch_linear<T>(
      linear_transposed({parts.grad_global_qkv, is_float32}, inputs.global_qkv_weight,
          parts.grad_normalized, is_float32, global_rows, 3 * shape.width, shape.global_width),
      stream);
  launch("co_attention_backward_norm", co_attention_backward_norm<T>,
      {dim3{static_cast<unsigned>(divide_up(global_rows, 4))}, dim3{128}}, stream,
      static_cast<const T*>(parts.grad_normalized), static_cast<const T*>(inputs.global),
      static_cast<const T*>(args.grad_global), inputs.global_norm_weight,
      static_cast<const float*>(parts.operands.statistics), global_rows,
      static_cast<int>(shape.global_width), static_cast<T*>(args.out_global));

  const auto sum_columns = [&](const void* matrix, int64_t rows, int64_t columns, float* to) {
    launch_column_sums(
        storage_of<T>, matrix, nullptr, nullptr, rows, columns, l, parts.slot_partials, to, stream);
  };
  float* sums = args.parameters;
  launch_column_sums(storage_of<T>, parts.grad_normalized, inputs.global, parts.operands.statistics,
      global_rows, shape.global_width, l, parts.slot_partials, sums + offsets.norm_weight, stream);
  sum_columns(parts.grad_global_qkv, global_rows, 3 * shape.width, sums + offsets.global_qkv_bias);
  sum_columns(args.grad_local, local_rows, shape.local_width, sums + offsets.local_proj_bias);
  sum_columns(args.grad_global, global_rows, shape.global_width, sums + offsets.global_proj_bias);
  if (!l.absorbed) {
    sum_columns(parts.grad_local_qkv, local_rows, 3 * shape.width, parts.grad_folded_bias);
    Linear tokens = linear_transposed({parts.grad_local_qkv, is_float32}, inputs.local_qkv_weight,
        args.out_local, is_float32, local_rows, 3 * shape.width, shape.local_width);
    tokens.residual = args.grad_local;
    launch_linear<T>(tokens, stream);
  } else if (!parts.writes_stream(l)) {
    const int64_t values = local_rows * shape.local_width;
    launch("co_attention_unpad", co_attention_unpad<T>,
        {dim3{static_cast<unsigned>(divide_up(values, 256))}, dim3{256}}, stream,
        static_cast<const T*>(parts.grad_tokens), int64_t{l.columns}, local_rows,
        static_cast<int>(shape.local_width), static_cast<T*>(args.out_local));
  }
}

// Gradients of the results of both attentions, and what each query's softmax knows of them.
template <typename T>
void backward_of_results(const CoAttentionBackward& args, const CoAttentionBackwardParts& parts,
    const CoAttentionLaunch& l, const Direction& local, const Direction& global,
    const Rows& grad_local, const Rows& grad_global, cudaStream_t stream) {
  constexpr bool is_float32 = sizeof(T) == 4;
  const CoAttentionShape& shape = args.shape;
  const CoAttentionInputs& inputs = parts.operands.inputs;
  const int64_t global_rows = shape.batch * shape.global_tokens;
  const int64_t local_rows = shape.batch * shape.local_tokens, width = shape.width;
  void* grad_attended = l.absorbed ? parts.grad_attended : parts.grad_to_global;
  launch_linear<T>(
      linear_transposed({args.grad_global, is_float32}, inputs.global_proj_weight, grad_attended,
          is_float32 || l.absorbed, global_rows, shape.global_width, width),
      stream);
  Rows results = rows_of_attended(shape, args.attended);
  if (l.absorbed) {
    SmallProduct p{};
    p.x = parts.grad_attended;
    p.x_image = shape.global_tokens * width;
    p.x_head = shape.head_dim;
    p.x_row = width;
    p.y = inputs.local_qkv_weight;
    p.y_first = 2 * width * shape.local_width;
    p.y_head = shape.head_dim * shape.local_width;
    p.y_depth = shape.local_width;
    p.y_column = 1;
    p.factor = 1;
    p.depth = static_cast<int>(shape.head_dim);
    set_result(p, grad_global, is_float32, shape.local_width, l.columns);
    launch_small_product<T>(shape, p, stream);
    p.y = inputs.local_qkv_bias;
    p.y_first = 2 * width;
    p.y_head = shape.head_dim;
    p.y_depth = 1;
    set_result(p, rows_of_heads(shape, parts.constants, 1), true, 1, 1);
    launch_small_product<T>(shape, p, stream);
    results = rows_of_heads(shape, parts.unprojected, l.columns);
    launch_global<T>(global, {parts.partials, nullptr, parts.kept, results}, l, stream);
    if (l.copies_grad) {
      launch_pad<T>(args.grad_local, local_rows, shape.local_width, parts.grad_to_local, stream);
    }
  } else {
    launch_linear<T>(linear_transposed({args.grad_local, is_float32}, inputs.local_proj_weight,
                         parts.grad_to_local, is_float32, local_rows, shape.local_width, width),
        stream);
  }
  LocalResult again{};
  again.out = l.absorbed ? nullptr : parts.to_local;
  again.out_columns = static_cast<int>(width);
  again.grads = grad_local;
  again.facts = parts.local_facts;
  launch_local<T>(local, again, l, stream);
  const int64_t rows = global_rows * shape.heads;
  // Without dropout the constant of a query's weight gradients cancels against δ.
  const bool has_constant = l.absorbed && inputs.dropout.threshold > 0;
  launch("co_attention_global_facts", co_attention_global_facts<T>,
      {dim3{static_cast<unsigned>(divide_up(rows, 4))}, dim3{128}}, stream, global, grad_global,
      args.global_softmax, results, static_cast<const float*>(has_constant ? parts.kept : nullptr),
      static_cast<const float*>(has_constant ? parts.constants : nullptr), parts.global_facts,
      l.absorbed ? parts.zero : nullptr);
}

template <typename T>
void co_attention_backward_of(
    const CoAttentionBackward& args, const CoAttentionLaunch& l, cudaStream_t stream) {
  const CoAttentionShape& shape = args.shape;
  const CoAttentionBackwardParts parts(args, storage_of<T>, l);
  const CoAttentionOperands& operands = parts.operands;
  const CoAttentionInputs& inputs = operands.inputs;
  prepare<T>(shape, args.inputs, operands, l, stream);
  const Direction local = to_local<T>(shape, inputs, operands, l);
  const Direction global = to_global<T>(shape, inputs, operands, l);
  const int64_t width = shape.width, global_rows = shape.batch * shape.global_tokens;
  const Rows grad_local =
      l.absorbed ? rows_of_tokens(shape, parts.grad_to_local, l.columns)
                 : Rows{parts.grad_to_local, shape.local_tokens * width, shape.head_dim, width};
  const Rows grad_global =
      l.absorbed ? rows_of_heads(shape, parts.grad_to_global, l.columns)
                 : Rows{parts.grad_to_global, shape.global_tokens * width, shape.head_dim, width};
  backward_of_results<T>(args, parts, l, local, global, grad_local, grad_global, stream);

  const float scale = logit_scale(shape.head_dim);
  const float local_scale = l.absorbed ? 1.0f : scale;
  const DirectionGradients of_local{grad_local, parts.local_facts, local_scale, l.absorbed};
  const DirectionGradients of_global{grad_global, parts.global_facts, scale, l.absorbed};
  const auto local_rows_of = [&](int part) {
    return result_rows(l.absorbed
                           ? rows_of_tokens(shape, parts.grad_queries, l.columns)
                           : rows_of_qkv<T>(shape, parts.grad_local_qkv, shape.local_tokens, part));
  };
  const auto sums_of = [&](int part) { return partial_rows(shape, l, parts.partials, part); };
  launch_backward_queries<T>(true, local, of_local, l, local_rows_of(0), stream);
  // In the order of Q, K and V, or of A, U and G.
  launch_backward_queries<T>(false, global, of_global, l, sums_of(l.absorbed ? 2 : 0), stream);
  DirectionGradients of_global_keys = of_local;
  of_global_keys.scale = scale;
  launch_backward_keys<T, false>(false, local, of_global_keys, l,
      {sums_of(l.absorbed ? 0 : 1), sums_of(l.absorbed ? 1 : 2),
          l.absorbed ? parts.bias_partials : nullptr},
      stream);
  DirectionGradients of_local_keys = of_global;
  of_local_keys.scale = local_scale;
  if (l.absorbed) {
    const bool is_stream = parts.writes_stream(l);
    const ResultRows to = result_rows(
        rows_of_tokens(shape, is_stream ? args.out_local : parts.grad_tokens, l.columns));
    const KeyResult tokens{to, to, nullptr, {parts.grad_queries, parts.grad_to_local}};
    launch_backward_keys<T, true>(true, global, of_local_keys, l, tokens, stream);
    const int64_t matrix = shape.heads * global_rows * l.columns;
    launch_sum(parts.partials, l.splits, 3 * matrix, parts.grad_absorbed, stream);
    launch_sum(
        parts.bias_partials, l.splits, shape.heads * global_rows, parts.grad_key_bias, stream);
    backward_of_absorbed<T>(shape, inputs, parts, l, stream);
  } else {
    launch_backward_keys<T, false>(
        true, global, of_local_keys, l, {local_rows_of(1), local_rows_of(2), nullptr}, stream);
    launch_sum(parts.partials, l.splits, global_rows * 3 * width,
        static_cast<T*>(parts.grad_global_qkv), stream);
  }
  launch_sum(args.attended, 1, global_rows * width, static_cast<T*>(parts.attended), stream);
  backward_of_tokens<T>(args, parts, l, stream);
}

}  // namespace dsnet::cuda
