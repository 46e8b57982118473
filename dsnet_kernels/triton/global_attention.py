"""``global_attention`` in Triton: the table of tiles, checks, allocation, launches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import checks
from ..reference.dropout import threshold
from . import can_run, norm_linear
from .global_attention_backward_kernels import (
    global_attention_few_grad,
    global_attention_many_grad_kv,
    global_attention_many_grad_q,
)
from .global_attention_kernels import global_attention_few, global_attention_many
from .launch import Launch, block, cached

FEW = 64
"""Up to so many tokens, a head of an image is one program."""


@dataclass(frozen=True)
class Problem:
    """The shape of a call."""

    batch: int
    tokens: int
    width: int
    heads: int
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def projection(self) -> norm_linear.NormLinear:
        return norm_linear.NormLinear(self.rows, self.width, 3 * self.width, self.dtype)

    @property
    def groups(self) -> int:
        return self.batch * self.heads

    @property
    def few(self) -> bool:
        """float32 has no room on chip for wider heads: all their operands are in registers."""
        return self.tokens <= FEW and (self.narrow or self.head_dim <= 32)

    @property
    def narrow(self) -> bool:
        """Whether x has 16 bits, for tensor cores; float32 has its products on the other ones."""
        return self.dtype.itemsize == 2


def _head_constants(p: Problem) -> dict[str, int]:
    return {"WIDTH": p.width, "HEAD_DIM": p.head_dim, "BLOCK_D": block(p.head_dim)}


@cached
def few_launch(p: Problem, kernel: Any) -> Launch:
    """Of ``global_attention_few`` and its gradient."""
    block_c = block(p.width, 64 if p.width % 64 == 0 else 32) if p.narrow else 16
    constants = _head_constants(p) | {"BLOCK_T": block(p.tokens), "BLOCK_C": block_c}
    warps = 8 if p.head_dim > 64 or not p.narrow else 4
    stages = 2 if block_c == 64 else 3
    return Launch(kernel, p.groups, constants, warps, stages)


@cached
def many_launches(p: Problem) -> dict[str, Launch]:
    """The tiles (queries, keys) of attention and of its two gradients, limited by registers."""
    if p.narrow and p.head_dim <= 32:
        forward, grad_q, grad_kv, warps, stages = (64, 64), (64, 64), (32, 64), 4, 3
    elif p.narrow:
        forward, grad_q, grad_kv, warps, stages = (64, 64), (64, 32), (32, 64), 8, 2
    elif p.head_dim <= 32:
        forward, grad_q, grad_kv, warps, stages = (64, 32), (32, 32), (32, 32), 8, 1
    else:
        forward, grad_q, grad_kv, warps, stages = (32, 16), (32, 16), (16, 16), 8, 1

    def launch(kernel: Any, tile: tuple[int, int], cut: int) -> Launch:
        constants = {"BLOCK_Q": tile[0], "BLOCK_K": tile[1], "STAGES": stages}
        programs = p.groups * triton.cdiv(p.tokens, cut)
        return Launch(kernel, programs, _head_constants(p) | constants, warps, stages)

    return {
        "forward": launch(global_attention_many, forward, forward[0]),
        "grad_q": launch(global_attention_many_grad_q, grad_q, grad_q[0]),
        "grad_kv": launch(global_attention_many_grad_kv, grad_kv, grad_kv[1]),
    }


def _check(
    x: Tensor,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> Problem:
    checks.dims("x", x, "BMC")
    reason = can_run(x)
    if reason is not None:
        raise TypeError(reason)
    batch, tokens, width = x.shape
    checks.heads("channels of x", width, num_heads)
    head_dim = width // num_heads
    if head_dim % 8 or not 8 <= head_dim <= 128:
        expected = "expected heads of 8, 16, … 128 channels"
        raise ValueError(f"num_heads: {expected}, got {num_heads} of {head_dim}")
    checks.shape("norm_weight", norm_weight, (width,))
    checks.shape("norm_bias", norm_bias, (width,))
    checks.shape("qkv_weight", qkv_weight, (3 * width, width))
    checks.shape("qkv_bias", qkv_bias, (3 * width,))
    checks.parameters(
        "x",
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
    )
    checks.probability("dropout_p", dropout_p)
    checks.seed("seed", seed, "x", x)
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed: expected a tensor beside dropout_p = {dropout_p}, got None")
    return Problem(batch, tokens, width, num_heads, x.dtype)


def _numbers(p: Problem, dropout_p: float) -> tuple[float, float]:
    """``scale`` and ``keep_scale`` of the kernels."""
    return 1 / math.sqrt(p.head_dim), 1 / (1 - dropout_p)


def _project(p: Problem, x: Tensor, parameters: list[Tensor], eps: float) -> Tensor:
    qkv = x.new_empty((p.batch, p.tokens, 3 * p.width))
    return norm_linear.forward(p.projection, x, parameters, qkv, eps)


def forward(
    x: Tensor,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_qkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, C) in x's dtype and the logarithms of the softmaxes' sums, (B, h, M) in float32.

    Last an empty tensor: nothing is kept, the backward projects again.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    parameters = [norm_weight, norm_bias, qkv_weight, qkv_bias]
    p = _check(x, num_heads, *parameters, dropout_p, seed)
    if keep_qkv:
        raise ValueError("keep_qkv: expected False, for the backward projects again, got True")
    out = x.new_empty(x.shape)
    lse = x.new_empty((p.batch, num_heads, p.tokens), dtype=torch.float32)
    none = lse.new_empty((0,))
    if p.rows == 0:
        return out, lse, none
    x = x.contiguous()
    parameters = [parameter.contiguous() for parameter in parameters]
    seed = seed if dropout_p > 0 else None
    scale, keep_scale = _numbers(p, dropout_p)
    with torch.cuda.device_of(x):
        if p.few:
            few_launch(p, global_attention_few)(
                x,
                *parameters,
                seed,
                out,
                lse,
                p.tokens,
                threshold(dropout_p),
                eps,
                scale,
                keep_scale,
            )
        else:
            qkv = _project(p, x, parameters, eps)
            many_launches(p)["forward"](
                x, qkv, seed, out, lse, p.tokens, threshold(dropout_p), scale, keep_scale
            )
    return out, lse, none


def backward(
    grad: Tensor,
    x: Tensor,
    lse: Tensor,
    qkv: None,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x (B, M, C), and of the parameters in float32: (C), (C), (3·C, C), (3·C).

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    parameters = [norm_weight, norm_bias, qkv_weight, qkv_bias]
    p = _check(x, num_heads, *parameters, dropout_p, seed)
    checks.shape("grad", grad, tuple(x.shape))
    checks.same_dtype("x", x, "grad", grad)
    checks.shape("lse", lse, (p.batch, num_heads, p.tokens))
    checks.same_device("x", x, "lse", lse)
    if lse.dtype != torch.float32:
        raise TypeError(f"lse: expected torch.float32, got {lse.dtype}")
    if p.rows == 0:
        return x.new_empty(x.shape), *(
            torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters
        )
    grad, x, lse = grad.contiguous(), x.contiguous(), lse.contiguous()
    parameters = [parameter.contiguous() for parameter in parameters]
    seed = seed if dropout_p > 0 else None
    with torch.cuda.device_of(x):
        grad_qkv = _attention_gradients(p, grad, x, lse, parameters, eps, dropout_p, seed)
        return norm_linear.backward(p.projection, grad, x, grad_qkv, parameters, eps)


def _attention_gradients(
    p: Problem,
    grad: Tensor,
    x: Tensor,
    lse: Tensor,
    parameters: list[Tensor],
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """(B, M, 3·C) in x's dtype."""
    scale, keep_scale = _numbers(p, dropout_p)
    grad_qkv = x.new_empty((p.batch, p.tokens, 3 * p.width))
    if p.few:
        few_launch(p, global_attention_few_grad)(
            grad,
            x,
            lse,
            *parameters,
            seed,
            grad_qkv,
            p.tokens,
            threshold(dropout_p),
            eps,
            scale,
            keep_scale,
        )
    else:
        qkv = _project(p, x, parameters, eps)
        statistics = lse.new_empty((p.batch, p.heads, 2, p.tokens))
        for name in ("grad_q", "grad_kv"):
            many_launches(p)[name](
                grad,
                qkv,
                lse,
                seed,
                statistics,
                grad_qkv,
                p.tokens,
                threshold(dropout_p),
                scale,
                keep_scale,
            )
    return grad_qkv
