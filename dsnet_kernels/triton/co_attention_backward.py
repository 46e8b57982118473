"""``co_attention`` in Triton: allocation and launches of the backward."""

import math

import torch
from torch import Tensor

from .. import checks
from ..reference.dropout import threshold
from . import norm_linear
from .co_attention_launches import (
    GLOBAL_PARAMETERS,
    PARAMETERS,
    Problem,
    global_sums_launch,
    grad_global_launch,
    grad_local_launch,
)
from .co_attention_operands import (
    Operands,
    absorb,
    local_matrices,
    make_operands,
    make_problem,
    numbers,
    of_absorbed,
    of_heads,
)
from .products import Columns, Matrices, multiply, multiply_over_rows

Gradients = dict[str, Tensor]
"""Of parameters, in float32."""


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _result_gradients(
    p: Problem, o: Operands, grad_local: Tensor, grad_global: Tensor, weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of what local and global queries attend to: as the kernels take them, and the latter (dO)."""
    grad_attended = grad_global.new_empty((p.batch, p.global_tokens, p.dim), dtype=o.qkv.dtype)
    matrix = Matrices(weights["global_proj_weight"], (1, p.dim))
    multiply(Columns(grad_global), matrix, Columns(grad_attended), p.dtype)
    if p.absorbed:
        rows = absorb(p, of_heads(p, grad_attended), local_matrices(p, weights, 2, by_row=False))
        return grad_local, rows, grad_attended
    grad_heads = grad_local.new_empty((p.batch, p.tokens, p.dim))
    matrix = Matrices(weights["local_proj_weight"], (1, p.dim))
    multiply(Columns(grad_local), matrix, Columns(grad_heads), p.dtype)
    return grad_heads, grad_attended, grad_attended


def _sum_over_head(p: Problem, x: Tensor) -> Tensor:
    """(B, M, h) from (B, M, dim)."""
    return x.unflatten(2, (p.heads, p.head_dim)).sum(3)


def _attention_gradients(
    p: Problem,
    o: Operands,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    softmaxes: tuple[Tensor, Tensor],
    value_bias: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Of the local rows and the global ones, by the three kernels.

    Returns grad_local or (B, N, 3·dim), projected what the local queries attend to, absorbed sums
    (3, Cl) of x∘dT, dT and grad_local; of the global rows (units, B, M, h·width) and, absorbed,
    (2, B, M, h) of the key bias and of the kept weights.
    """
    grad_local, grad_heads, grad_rows, grad_attended = grads
    local_softmax, global_softmax = softmaxes
    local = o.local[0]
    rows, sizes = (p.batch, p.global_tokens, p.heads), (p.tokens, p.global_tokens)
    numbers_ = (threshold(dropout_p), *numbers(p, dropout_p))
    constant = _sum_over_head(p, grad_attended * value_bias) if p.absorbed else None

    launch, splits = global_sums_launch(p)
    partial = _empty(local, splits, 2, *rows)
    launch(
        *o.local[1:],
        *o.affine,
        o.to_global,
        grad_rows,
        global_softmax,
        constant,
        seed,
        partial,
        p.batch,
        *sizes,
        splits,
        *numbers_,
    )
    delta, total = partial.sum(0)
    local_sums = _empty(local, p.batch, p.heads, p.tokens, 2)
    inputs = (
        grad_heads,
        *o.local,
        *o.affine,
        o.to_local[0],
        o.key_bias,
        o.to_local[1],
        o.to_global,
        grad_rows,
        local_softmax,
        global_softmax,
        torch.stack([delta / total, 1 / total]),
        constant,
        seed,
        local_sums,
    )

    launch = grad_local_launch(p)
    if p.absorbed:
        out, attended_local = torch.empty_like(grad_local), None
        blocks = p.batch * -(-p.tokens // launch.constants["BLOCK_N"])
        partial = _empty(local, blocks, 3, p.local_width)
    else:
        out = grad_local.new_empty((p.batch, p.tokens, 3 * p.dim))
        attended_local, partial = grad_local.new_empty((p.batch, p.tokens, p.dim)), None
    stream = grad_local if p.absorbed else None
    launch(stream, *inputs, attended_local, out, partial, p.batch, *sizes, *numbers_)
    sums = None if partial is None else partial.sum(0)

    launch, splits = grad_global_launch(p)
    partial = _empty(local, splits, launch.constants["UNITS"], *rows[:2], p.heads * p.width)
    partial_sums = _empty(local, splits, 2, *rows) if p.absorbed else None
    launch(*inputs, partial, partial_sums, p.batch, *sizes, splits, *numbers_)
    row_sums = None if partial_sums is None else partial_sums.sum(0)
    return out, attended_local, sums, partial.sum(0), row_sums


def _through_matrices(
    p: Problem,
    o: Operands,
    of_rows: Tensor,
    of_sums: Tensor,
    grad_attended: Tensor,
    weights: dict[str, Tensor],
) -> tuple[Tensor, Gradients]:
    """From those of A, a, U, G and R to (B, M, 3·dim) and to the local projections'.

    The key bias adds one number to all logits of a query, and has no gradient.
    """
    of_queries, of_keys, of_values, rows = (of_absorbed(p, each) for each in of_rows)
    of_key_bias, kept = of_sums
    q, k, v = (of_heads(p, o.qkv, i * p.dim) for i in range(3))
    grad_qkv = o.qkv.new_empty(o.qkv.shape, dtype=p.dtype)
    grad_q, grad_k, grad_v = (of_heads(p, grad_qkv, i * p.dim) for i in range(3))
    fp32 = torch.float32
    multiply(of_queries, local_matrices(p, weights, 1, by_row=True), grad_q, fp32)
    matrices, bias = local_matrices(p, weights, 0, by_row=True), weights["local_qkv_bias"]
    multiply(of_keys, matrices, grad_k, fp32, bias=bias, weights=of_key_bias)
    proj = Matrices(weights["local_proj_weight"], (1, p.dim), step=p.head_dim)
    multiply(of_values, proj, grad_v, fp32)

    weight = _empty(o.qkv, 3 * p.dim, p.local_width)
    heads = of_heads(p, grad_attended)
    for x, y, part in zip((k, q, heads), (of_keys, of_queries, rows), weight.chunk(3), strict=True):
        multiply_over_rows(x, y, Columns(part), fp32)
    proj_weight = _empty(o.qkv, p.local_width, p.dim)
    multiply_over_rows(of_values, v, Columns(proj_weight, step=p.head_dim), fp32)

    def weighted(x: Tensor, by: Tensor) -> Tensor:
        return (x.unflatten(2, (p.heads, p.head_dim)) * by[..., None]).sum((0, 1)).flatten()

    bias = torch.zeros_like(weights["local_qkv_bias"], dtype=fp32)
    bias[: p.dim] = weighted(o.qkv[..., p.dim : 2 * p.dim], of_key_bias)
    bias[2 * p.dim :] = weighted(grad_attended, kept)
    # Zero, and NaN where there is one in the streams or gradients.
    bias[p.dim : 2 * p.dim] = 0 * bias[2 * p.dim :]
    named = {
        "local_qkv_weight": weight,
        "local_qkv_bias": bias,
        "local_proj_weight": proj_weight,
    }
    return grad_qkv, named


def _through_projection(
    p: Problem,
    grad_local: Tensor,
    local: Tensor,
    grad_qkv: Tensor,
    attended: Tensor,
    weights: dict[str, Tensor | None],
    eps: float,
) -> tuple[Tensor, Gradients]:
    """The gradient of the local stream, and those of all its parameters."""
    named = {
        "local_proj_weight": _empty(local, p.local_width, p.dim),
        "local_proj_bias": _empty(local, p.local_width),
    }
    weight, bias = named.values()
    multiply_over_rows(Columns(grad_local), Columns(attended), Columns(weight), p.dtype, sums=bias)
    names = ("local_scale", "local_shift", "local_qkv_weight", "local_qkv_bias")
    parameters = [weights[name] for name in names]
    new_grad_local, *grads = norm_linear.backward(
        p.local_projection, grad_local, local, grad_qkv, parameters, eps
    )
    return new_grad_local, named | dict(zip(names, grads, strict=True))


def backward(
    grad_local: Tensor,
    grad_global: Tensor,
    local: Tensor,
    global_: Tensor,
    local_softmax: Tensor,
    global_softmax: Tensor,
    attended: Tensor,
    local_qkv: None,
    global_qkv: None,
    num_heads: int,
    *others: Tensor | float | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_local, grad_global and, in float32, one row of all parameters' gradients in their order.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    *parameters, eps, dropout_p, seed, absorbed = others
    p, weights = make_problem(local, global_, num_heads, parameters, dropout_p, seed, absorbed)
    for name, grad, stream in (("local", grad_local, local), ("global_", grad_global, global_)):
        checks.shape(f"grad_{name.rstrip('_')}", grad, tuple(stream.shape))
        checks.same_dtype(name, stream, f"grad_{name.rstrip('_')}", grad)
    for name, tensor, size in (
        ("local_softmax", local_softmax, (p.heads, p.tokens, 2)),
        ("global_softmax", global_softmax, (p.heads, p.global_tokens, 2)),
        ("attended", attended, (p.global_tokens, p.dim)),
    ):
        checks.shape(name, tensor, (p.batch, *size))
        checks.same_device("local", local, name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    if p.batch == 0:
        count = sum(math.prod(shape) for shape in p.parameter_shapes)
        flat = local.new_zeros((count,), dtype=torch.float32)
        return torch.empty_like(local), torch.empty_like(global_), flat
    tensors = (grad_local, grad_global, local, global_, local_softmax, global_softmax, attended)
    grad_local, grad_global, local, global_, *softmaxes, attended = (
        tensor.contiguous() for tensor in tensors
    )
    seed = seed if dropout_p > 0 else None
    with torch.cuda.device_of(local):
        o = make_operands(p, local, global_, weights, eps)
        grad_heads, grad_rows, grad_attended = _result_gradients(
            p, o, grad_local, grad_global, weights
        )
        of_local, attended_local, sums, of_rows, of_sums = _attention_gradients(
            p,
            o,
            (grad_local, grad_heads, grad_rows, grad_attended),
            tuple(softmaxes),
            weights["local_qkv_bias"][2 * p.dim :],
            dropout_p,
            seed,
        )
        if p.absorbed:
            grad_qkv, named = _through_matrices(p, o, of_rows, of_sums, grad_attended, weights)
            names = ("local_scale", "local_shift", "local_proj_bias")
            named |= dict(zip(names, sums, strict=True))
            new_grad_local = of_local
        else:
            grad_qkv = torch.cat(tuple(of_rows), dim=2).to(p.dtype)
            new_grad_local, named = _through_projection(
                p, grad_local, local, of_local, attended_local, weights, eps
            )
        named["global_proj_weight"] = _empty(local, p.global_width, p.dim)
        named["global_proj_bias"] = _empty(local, p.global_width)
        multiply_over_rows(
            Columns(grad_global),
            Columns(attended),
            Columns(named["global_proj_weight"]),
            p.dtype,
            sums=named["global_proj_bias"],
        )
        parameters = [weights[name] for name in GLOBAL_PARAMETERS]
        new_grad_global, *grads = norm_linear.backward(
            p.global_projection, grad_global, global_, grad_qkv, parameters, eps
        )
        named |= dict(zip(GLOBAL_PARAMETERS, grads, strict=True))
        flat = torch.cat([named[name].flatten() for name in PARAMETERS])
    return new_grad_local, new_grad_global, flat
