"""``global_attention`` in Triton: the table of tiles, checks, allocation, launches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import checks
from ..reference.dropout import threshold
from . import can_run
from .global_attention_backward_kernels import (
    global_attention_few_grad,
    global_attention_grad_weight,
    global_attention_grad_x,
    global_attention_many_grad_kv,
    global_attention_many_grad_q,
    global_attention_sum_slots,
)
from .global_attention_kernels import (
    global_attention_few,
    global_attention_many,
    global_attention_project,
)

FEW = 64
"""Up to so many tokens, a head of an image is one program."""

SLOTS = 32
"""Partial sums of a parameter's gradient, at most: the last kernel reads them at once."""

WHOLE_ROWS = 512
"""Channels up to which the gradient through a LayerNorm keeps its rows in registers."""


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, and what it is compiled for; from shape and dtype alone.

    Sums therefore have an order that does not depend on the GPU.
    """

    kernel: Any
    programs: int
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def __call__(self, *args: Any) -> None:
        self.kernel[(self.programs,)](*args, **self.constants, **self.options)


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


def _block(size: int, limit: int = 2**31) -> int:
    """A power of two that holds ``size``, 16 … ``limit``: the least that ``tl.dot`` takes is 16."""
    return min(max(16, triton.next_power_of_2(size)), limit)


def _head_constants(p: Problem) -> dict[str, int]:
    return {"WIDTH": p.width, "HEAD_DIM": p.head_dim, "BLOCK_D": _block(p.head_dim)}


def few_launch(p: Problem, kernel: Any) -> Launch:
    """Of ``global_attention_few`` and its gradient."""
    block_c = _block(p.width, 64 if p.width % 64 == 0 else 32) if p.narrow else 16
    constants = _head_constants(p) | {"BLOCK_T": _block(p.tokens), "BLOCK_C": block_c}
    warps = 8 if p.head_dim > 64 or not p.narrow else 4
    stages = 2 if block_c == 64 else 3
    return Launch(kernel, p.groups, constants, warps, stages)


def project_launch(p: Problem) -> Launch:
    block_t, block_n, block_c = (64, 64, _block(p.width, 64)) if p.narrow else (64, 64, 16)
    programs = triton.cdiv(p.rows, block_t) * triton.cdiv(3 * p.width, block_n)
    constants = {"WIDTH": p.width, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_C": block_c}
    return Launch(global_attention_project, programs, constants, warps=4, stages=2)


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


def grad_x_launch(p: Problem) -> Launch:
    """Blocks of whole rows up to WHOLE_ROWS channels; 8192 sums are what registers hold."""
    block_c = _block(p.width, WHOLE_ROWS)
    block_t = max(16, min(64, 8192 // block_c))
    constants = {
        "WIDTH": p.width,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_N": 32 if p.narrow else 16,
    }
    warps = 4 if p.narrow and block_c < 256 else 8
    programs = triton.cdiv(p.rows, block_t)
    return Launch(global_attention_grad_x, programs, constants, warps, stages=2)


def grad_weight_launch(p: Problem) -> tuple[Launch, int]:
    """With the number of slots: two programs for each of 132 multiprocessors, but no empty slot."""
    block_n, block_c = _block(3 * p.width, 64), _block(p.width, 64)
    block_t = 64 if p.narrow else 16
    tiles = triton.cdiv(3 * p.width, block_n) * triton.cdiv(p.width, block_c)
    slots = min(SLOTS, triton.cdiv(2 * 132, tiles), triton.cdiv(p.rows, block_t))
    constants = {"WIDTH": p.width, "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_T": block_t}
    warps = 4 if p.narrow else 8
    return Launch(global_attention_grad_weight, tiles * slots, constants, warps, stages=2), slots


def sum_slots_launch(p: Problem, slots: int) -> tuple[Launch, int]:
    """With the number of blocks of rows, each of which leaves sums for the LayerNorm."""
    # 8192 values of all slots in a program, limited by registers.
    block_slots = triton.next_power_of_2(slots)
    block_n, block_c = min(64, 256 // block_slots), 32
    blocks = triton.cdiv(3 * p.width, block_n)
    constants = {
        "WIDTH": p.width,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_SLOTS": block_slots,
    }
    programs = blocks * triton.cdiv(p.width, block_c)
    return Launch(global_attention_sum_slots, programs, constants, warps=4, stages=1), blocks


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
    project_launch(p)(x, *parameters, qkv, p.rows, eps)
    return qkv


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
) -> tuple[Tensor, Tensor]:
    """(B, M, C) in x's dtype and the logarithms of the softmaxes' sums, (B, h, M) in float32.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
    """
    parameters = [norm_weight, norm_bias, qkv_weight, qkv_bias]
    p = _check(x, num_heads, *parameters, dropout_p, seed)
    out = x.new_empty(x.shape)
    lse = x.new_empty((p.batch, num_heads, p.tokens), dtype=torch.float32)
    if p.rows == 0:
        return out, lse
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
    return out, lse


def backward(
    grad: Tensor,
    x: Tensor,
    lse: Tensor,
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
        return _projection_gradients(p, grad, x, grad_qkv, parameters, eps)


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


def _projection_gradients(
    p: Problem, grad: Tensor, x: Tensor, grad_qkv: Tensor, parameters: list[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """From those of Q, K and V to those of x and of the parameters."""
    norm_weight, norm_bias, qkv_weight, _ = parameters

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    grad_x, statistics = torch.empty_like(x), empty(2, p.rows)
    grad_x_launch(p)(grad, x, grad_qkv, norm_weight, qkv_weight, grad_x, statistics, p.rows, eps)

    launch, slots = grad_weight_launch(p)
    partial_weight = empty(slots, 3 * p.width, p.width)
    partial_bias = empty(slots, 3 * p.width)
    launch(x, grad_qkv, statistics, partial_weight, partial_bias, p.rows, slots)

    launch, blocks = sum_slots_launch(p, slots)
    grad_weight, grad_bias = empty(3 * p.width, p.width), empty(3 * p.width)
    partial_norm = empty(blocks, 2, p.width)
    launch(
        partial_weight,
        partial_bias,
        norm_weight,
        norm_bias,
        qkv_weight,
        grad_qkv,
        grad_weight,
        grad_bias,
        partial_norm,
        slots,
    )
    grad_norm = (partial_norm[:, i].sum(0) for i in range(2))
    return grad_x, *grad_norm, grad_weight, grad_bias
