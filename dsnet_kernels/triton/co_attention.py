"""``co_attention`` in Triton: allocation and launches of the forward."""

import torch
from torch import Tensor

from ..reference.dropout import threshold
from .co_attention_backward import backward
from .co_attention_launches import Problem, combine_launch, to_global_launch, to_local_launch
from .co_attention_operands import (
    Operands,
    local_matrices,
    make_operands,
    make_problem,
    numbers,
    of_absorbed,
    of_heads,
)
from .products import Columns, Matrices, multiply

__all__ = ["backward", "forward"]


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
        *numbers(p, dropout_p),
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

    scale, keep_scale = numbers(p, dropout_p)
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
            of_absorbed(p, rows),
            local_matrices(p, weights, 2, by_row=True),
            of_heads(p, attended),
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
) -> tuple[Tensor, ...]:
    """(B, N, Cl), (B, M, Cg) and, in float32, both softmaxes and what the global queries attend to.

    Last two empty tensors: nothing is kept, the backward projects again. ``others`` are the
    parameters, eps, dropout_p, seed, absorbed and keep_qkv.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    *parameters, eps, dropout_p, seed, absorbed, keep_qkv = others
    p, weights = make_problem(local, global_, num_heads, parameters, dropout_p, seed, absorbed)
    if keep_qkv:
        raise ValueError("keep_qkv: expected False, for the backward projects again, got True")
    # Results must not share memory, so each is its own.
    kept = [local.new_empty((0,), dtype=torch.float32) for _ in range(2)]
    if p.batch == 0:
        sizes = ((p.heads, p.tokens, 2), (p.heads, p.global_tokens, 2), (p.global_tokens, p.dim))
        saved = (local.new_empty((0, *size), dtype=torch.float32) for size in sizes)
        return torch.empty_like(local), torch.empty_like(global_), *saved, *kept
    local, global_ = local.contiguous(), global_.contiguous()
    seed = seed if dropout_p > 0 else None
    with torch.cuda.device_of(local):
        o = make_operands(p, local, global_, weights, eps)
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
    return new_local, new_global, local_softmax, global_softmax, attended, *kept
