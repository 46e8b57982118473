"""``co_attention`` in Triton: operands of both forms, allocation, launches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..co_attention import absorbs
from ..reference.dropout import threshold
from . import norm_linear
from .co_attention_launches import (
    PARAMETERS,
    Problem,
    check,
    combine_launch,
    to_global_launch,
    to_local_launch,
)
from .products import Columns, Matrices, multiply


def _problem(
    local: Tensor,
    global_: Tensor,
    num_heads: int,
    parameters: tuple[Tensor | None, ...],
    dropout_p: float,
    seed: Tensor | None,
    absorbed: bool | None,
) -> tuple[Problem, dict[str, Tensor | None]]:
    """With the parameters by name, contiguous."""
    named = dict(zip(PARAMETERS, parameters, strict=True))
    if absorbed is None:
        absorbed = absorbs(local.shape[1], global_.shape[1], local.shape[2], num_heads)
    p = check(local, global_, num_heads, named, dropout_p, seed, absorbed)
    return p, {k: None if v is None else v.contiguous() for k, v in named.items()}


@dataclass(frozen=True)
class Operands:
    """What a head's rows are multiplied with, in the streams' dtype, and what they come from.

    ``local`` are queries, keys and values of the local tokens, with the affine that their loads
    apply; ``to_local`` are keys and values, ``to_global`` the queries of the global tokens.
    """

    qkv: Tensor  # (B, M, 3·dim) of the global tokens, in float32 where absorbed
    local: tuple[Tensor, Tensor, Tensor]
    affine: tuple[Tensor | None, Tensor | None]
    to_local: tuple[Tensor, Tensor]
    key_bias: Tensor | None  # (B, M, h) in float32
    to_global: Tensor


def _of_heads(p: Problem, x: Tensor, begin: int = 0) -> Columns:
    """d columns of each head from column ``begin`` on."""
    return Columns(x, begin, p.head_dim, p.heads, p.head_dim)


def _absorbed(p: Problem, x: Tensor) -> Columns:
    """Cl columns of each head in (B, M, h·Cl)."""
    return Columns(x, 0, p.local_width, p.heads, p.local_width)


def _absorb(p: Problem, x: Columns, matrices: Matrices) -> Tensor:
    """(B, M, h·Cl), formed in float32 and rounded once."""
    shape = (p.batch, p.global_tokens, p.heads * p.local_width)
    out = x.tensor.new_empty(shape, dtype=p.dtype)
    multiply(x, matrices, _absorbed(p, out), torch.float32)
    return out


def _local_matrices(p: Problem, weights: dict[str, Tensor], part: int, by_row: bool) -> Matrices:
    """Rows W_h of the local projection to Q, K or V (``part``), or their transposes."""
    strides = (p.local_width, 1) if by_row else (1, p.local_width)
    begin, step = (size * p.local_width for size in (part * p.dim, p.head_dim))
    return Matrices(weights["local_qkv_weight"], strides, begin, step)


def _operands(
    p: Problem, local: Tensor, global_: Tensor, weights: dict[str, Tensor | None], eps: float
) -> Operands:
    shape = (p.batch, p.global_tokens, 3 * p.dim)
    qkv = global_.new_empty(shape, dtype=torch.float32 if p.absorbed else p.dtype)
    names = ("global_norm_weight", "global_norm_bias", "global_qkv_weight", "global_qkv_bias")
    norm_linear.forward(p.global_projection, global_, [weights[n] for n in names], qkv, eps)
    affine = weights["local_scale"], weights["local_shift"]
    if not p.absorbed:
        q, k, v = (_part(qkv, i * p.dim) for i in range(3))
        local_qkv = local.new_empty((p.batch, p.tokens, 3 * p.dim))
        parameters = [*affine, weights["local_qkv_weight"], weights["local_qkv_bias"]]
        norm_linear.forward(p.local_projection, local, parameters, local_qkv, eps)
        of_local = tuple(_part(local_qkv, i * p.dim) for i in range(3))
        return Operands(qkv, of_local, (None, None), (k, v), None, q)
    q, k, v = (_of_heads(p, qkv, i * p.dim) for i in range(3))
    keys = _absorb(p, k, _local_matrices(p, weights, 0, by_row=False))
    key_bias = qkv[..., p.dim : 2 * p.dim] * weights["local_qkv_bias"][: p.dim]
    key_bias = key_bias.unflatten(2, (p.heads, p.head_dim)).sum(3)
    proj = Matrices(weights["local_proj_weight"], (p.dim, 1), step=p.head_dim)
    values = _absorb(p, v, proj)
    queries = _absorb(p, q, _local_matrices(p, weights, 1, by_row=False))
    return Operands(qkv, (local,) * 3, affine, (keys, values), key_bias, queries)


def _part(x: Tensor, begin: int) -> Tensor:
    """x from column ``begin`` on, for a kernel that knows its strides."""
    return x.flatten()[begin:]


def _numbers(p: Problem, dropout_p: float) -> tuple[float, float]:
    """``scale`` and ``keep_scale`` of the kernels."""
    return 1 / math.sqrt(p.head_dim), 1 / (1 - dropout_p)


def _attend_local(
    p: Problem,
    o: Operands,
    local: Tensor,
    weights: dict[str, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The new local stream and its softmax's (B, h, N, 2)."""
    out = torch.empty_like(local)
    softmax = local.new_empty((p.batch, p.heads, p.tokens, 2), dtype=torch.float32)
    bias = weights["local_proj_bias"]
    result = out if p.absorbed else local.new_empty((p.batch, p.tokens, p.dim))
    to_local_launch(p)(
        o.local[0],
        *o.affine,
        o.to_local[0],
        o.key_bias,
        o.to_local[1],
        seed,
        *((local, bias) if p.absorbed else (None, None)),
        result,
        softmax,
        p.tokens,
        p.global_tokens,
        threshold(dropout_p),
        *_numbers(p, dropout_p),
    )
    if not p.absorbed:
        matrix = Matrices(weights["local_proj_weight"], (p.dim, 1))
        multiply(Columns(result), matrix, Columns(out), p.dtype, bias=bias, residual=local)
    return out, softmax


def _attend_global(
    p: Problem,
    o: Operands,
    weights: dict[str, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the global queries attend to, (B, M, dim) in float32, and (B, h, M, 2)."""

    def empty(*shape: int) -> Tensor:
        return o.qkv.new_empty(shape, dtype=torch.float32)

    scale, keep_scale = _numbers(p, dropout_p)
    launch, splits = to_global_launch(p)
    partial = empty(splits, p.batch, p.global_tokens, p.heads * p.width)
    statistics = empty(splits, 3, p.batch, p.global_tokens, p.heads)
    launch(
        o.to_global,
        *o.local[1:],
        *o.affine,
        seed,
        partial,
        statistics,
        p.batch,
        p.tokens,
        p.global_tokens,
        splits,
        threshold(dropout_p),
        scale,
    )
    attended = empty(p.batch, p.global_tokens, p.heads * p.width)
    kept = empty(p.batch, p.global_tokens, p.heads)
    softmax = empty(p.batch, p.heads, p.global_tokens, 2)
    combine_launch(p)(
        partial,
        statistics,
        attended,
        kept,
        softmax,
        kept.numel(),
        splits,
        p.global_tokens,
        keep_scale,
    )
    if p.absorbed:
        # The raw rows that each query has attended to; their projection is linear.
        rows, attended = attended, empty(p.batch, p.global_tokens, p.dim)
        multiply(
            _absorbed(p, rows),
            _local_matrices(p, weights, 2, by_row=True),
            _of_heads(p, attended),
            torch.float32,
            bias=weights["local_qkv_bias"][2 * p.dim :],
            weights=kept,
        )
    return attended, softmax


def forward(
    local: Tensor,
    global_: Tensor,
    num_heads: int,
    *others: Tensor | float | bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, N, Cl), (B, M, Cg) and, in float32, both softmaxes and what the global queries attend to.

    ``others`` are the parameters, eps, dropout_p, seed and absorbed.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    *parameters, eps, dropout_p, seed, absorbed = others
    p, weights = _problem(local, global_, num_heads, parameters, dropout_p, seed, absorbed)
    if p.batch == 0:
        sizes = ((p.heads, p.tokens, 2), (p.heads, p.global_tokens, 2), (p.global_tokens, p.dim))
        saved = (local.new_empty((0, *size), dtype=torch.float32) for size in sizes)
        return torch.empty_like(local), torch.empty_like(global_), *saved
    local, global_ = local.contiguous(), global_.contiguous()
    seed = seed if dropout_p > 0 else None
    with torch.cuda.device_of(local):
        o = _operands(p, local, global_, weights, eps)
        new_local, local_softmax = _attend_local(p, o, local, weights, dropout_p, seed)
        attended, global_softmax = _attend_global(p, o, weights, dropout_p, seed)
        new_global = torch.empty_like(global_)
        multiply(
            Columns(attended),
            Matrices(weights["global_proj_weight"], (p.dim, 1)),
            Columns(new_global),
            p.dtype,
            bias=weights["global_proj_bias"],
            residual=global_,
        )
    return new_local, new_global, local_softmax, global_softmax, attended
