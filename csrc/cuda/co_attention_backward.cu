#include "cuda/co_attention_backward.cuh"

namespace dsnet::cuda {

size_t co_attention_workspace(
    const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l) {
  CoAttentionBackward counted = args;
  counted.workspace = nullptr;
  return CoAttentionBackwardParts(counted, storage, l).carver.used();
}

void co_attention_backward(const CoAttentionBackward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream) {
  if (args.shape.batch == 0) return;
  with_storage(
      storage, [&](auto zero) { co_attention_backward_of<decltype(zero)>(args, l, stream); });
}

void co_attention_backward_projections(const CoAttentionBackward& args, Storage storage,
    const CoAttentionLaunch& l, CUstream_st* stream) {
  const CoAttentionShape& shape = args.shape;
  if (shape.batch == 0) return;
  const CoAttentionBackwardParts parts(args, storage, l);
  const ParameterOffsets offsets(shape);
  float* sums = args.parameters;
  const int64_t blocks = divide_up(shape.local_width, NormBackward::columns);
  const Grid grid{
      dim3{static_cast<unsigned>(blocks)}, dim3{NormBackward::columns, NormBackward::row_lanes}};
  with_storage(storage, [&](auto zero) {
    launch("co_attention_unfold", co_attention_unfold<decltype(zero)>, grid, stream,
        static_cast<const float*>(parts.grad_folded_weight),
        static_cast<const float*>(parts.grad_folded_bias), args.inputs.local_qkv_weight,
        args.inputs.local_scale, args.inputs.local_shift, static_cast<int>(3 * shape.width),
        static_cast<int>(shape.local_width), sums + offsets.local_qkv_weight,
        sums + offsets.local_qkv_bias, sums + offsets.scale, sums + offsets.shift);
  });
}

std::vector<TokenProduct> co_attention_products(
    const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l) {
  const CoAttentionShape& shape = args.shape;
  const CoAttentionBackwardParts parts(args, storage, l);
  const CoAttentionOperands& operands = parts.operands;
  const ParameterOffsets offsets(shape);
  const int64_t local_rows = shape.batch * shape.local_tokens;
  const int64_t global_rows = shape.batch * shape.global_tokens, width = shape.width;
  const int64_t local_width = shape.local_width, global_width = shape.global_width;
  const bool is_float32 = storage == Storage::float32;
  float* sums = args.parameters;
  std::vector<TokenProduct> products{
      {parts.grad_global_qkv, operands.normalized, sums + offsets.global_qkv_weight, is_float32,
          global_rows, 3 * width, 3 * width, global_width, global_width, global_width},
      {args.grad_global, parts.attended, sums + offsets.global_proj_weight, is_float32, global_rows,
          global_width, global_width, width, width, width}};
  if (!l.absorbed) {
    products.push_back({parts.grad_local_qkv, operands.tokens, parts.grad_folded_weight, is_float32,
        local_rows, 3 * width, 3 * width, local_width, operands.token_row, local_width});
    products.push_back({args.grad_local, parts.to_local, sums + offsets.local_proj_weight,
        is_float32, local_rows, local_width, local_width, width, width, width});
    return products;
  }

  const int64_t matrix = global_rows * l.columns, dim = shape.head_dim;
  for (int64_t head = 0; head < shape.heads; ++head) {
    // Of queries, keys and values of the local tokens: what the global side has in their place.
    const auto* qkv = static_cast<const float*>(operands.global_qkv) + head * dim;
    const float* left[3] = {qkv + width, qkv, parts.grad_attended + head * dim};
    const int64_t left_stride[3] = {3 * width, 3 * width, width};
    const float* of_matrix = parts.grad_absorbed + head * matrix;
    const float* right[3] = {
        of_matrix, of_matrix + 2 * shape.heads * matrix, parts.unprojected + head * matrix};
    const float* right_bias[3] = {parts.grad_key_bias, parts.zero, parts.kept};
    for (int part = 0; part < 3; ++part) {
      const int64_t row = part * width + head * dim;
      products.push_back({left[part], right[part], parts.grad_folded_weight + row * local_width,
          true, global_rows, dim, left_stride[part], local_width, l.columns, local_width});
      products.push_back({left[part], right_bias[part] + head * global_rows,
          parts.grad_folded_bias + row, true, global_rows, dim, left_stride[part], 1, 1, 1});
    }
    products.push_back({of_matrix + shape.heads * matrix, qkv + 2 * width,
        sums + offsets.local_proj_weight + head * dim, true, global_rows, local_width, l.columns,
        dim, 3 * width, width});
  }
  return products;
}

}  // namespace dsnet::cuda
