"""The operands of ``co_attention``'s kernels in Triton, projected or absorbed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import norm_linear
from .co_attention_launches import GLOBAL_PARAMETERS, PARAMETERS, Problem, check
from .products import Columns, Matrices, multiply


def make_problem(
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


def of_heads(p: Problem, x: Tensor, begin: int = 0) -> Columns:
    """d columns of each head from column ``begin`` on."""
    return Columns(x, begin, p.head_dim, p.heads, p.head_dim)


def of_absorbed(p: Problem, x: Tensor) -> Columns:
    """Cl columns of each head in (B, M, h·Cl)."""
    return Columns(x, 0, p.local_width, p.heads, p.local_width)


def absorb(p: Problem, x: Columns, matrices: Matrices) -> Tensor:
    """(B, M, h·Cl), formed in float32 and rounded once."""
    shape = (p.batch, p.global_tokens, p.heads * p.local_width)
    out = x.tensor.new_empty(shape, dtype=p.dtype)
    multiply(x, matrices, of_absorbed(p, out), torch.float32)
    return out


def local_matrices(p: Problem, weights: dict[str, Tensor], part: int, by_row: bool) -> Matrices:
    """Rows W_h of the local projection to Q, K or V (``part``), or their transposes."""
    strides = (p.local_width, 1) if by_row else (1, p.local_width)
    begin, step = (size * p.local_width for size in (part * p.dim, p.head_dim))
    return Matrices(weights["local_qkv_weight"], strides, begin, step)


def make_operands(
    p: Problem, local: Tensor, global_: Tensor, weights: dict[str, Tensor | None], eps: float
) -> Operands:
    shape = (p.batch, p.global_tokens, 3 * p.dim)
    qkv = global_.new_empty(shape, dtype=torch.float32 if p.absorbed else p.dtype)
    parameters = [weights[name] for name in GLOBAL_PARAMETERS]
    norm_linear.forward(p.global_projection, global_, parameters, qkv, eps)
    affine = weights["local_scale"], weights["local_shift"]
    if not p.absorbed:
        q, k, v = (part(qkv, i * p.dim) for i in range(3))
        local_qkv = local.new_empty((p.batch, p.tokens, 3 * p.dim))
        parameters = [*affine, weights["local_qkv_weight"], weights["local_qkv_bias"]]
        norm_linear.forward(p.local_projection, local, parameters, local_qkv, eps)
        of_local = tuple(part(local_qkv, i * p.dim) for i in range(3))
        return Operands(qkv, of_local, (None, None), (k, v), None, q)
    q, k, v = (of_heads(p, qkv, i * p.dim) for i in range(3))
    keys = absorb(p, k, local_matrices(p, weights, 0, by_row=False))
    key_bias = qkv[..., p.dim : 2 * p.dim] * weights["local_qkv_bias"][: p.dim]
    key_bias = key_bias.unflatten(2, (p.heads, p.head_dim)).sum(3)
    proj = Matrices(weights["local_proj_weight"], (p.dim, 1), step=p.head_dim)
    values = absorb(p, v, proj)
    queries = absorb(p, q, local_matrices(p, weights, 1, by_row=False))
    return Operands(qkv, (local,) * 3, affine, (keys, values), key_bias, queries)


def part(x: Tensor, begin: int) -> Tensor:
    """x from column ``begin`` on, for a kernel that knows its strides."""
    return Columns(x, begin).pointer


def numbers(p: Problem, dropout_p: float) -> tuple[float, float]:
    """``scale`` and ``keep_scale`` of the kernels."""
    return 1 / math.sqrt(p.head_dim), 1 / (1 - dropout_p)
