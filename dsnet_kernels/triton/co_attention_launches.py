"""The table of tiles of ``co_attention`` in Triton, and its checks."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import checks
from ..co_attention import absorbs
from . import can_run
from .co_attention_backward_kernels import co_attention_grad_local
from .co_attention_grad_global_kernels import co_attention_global_sums, co_attention_grad_global
from .co_attention_kernels import (
    co_attention_combine,
    co_attention_to_global,
    co_attention_to_local,
)
from .launch import MULTIPROCESSORS, Launch, block, cached, in_packs
from .norm_linear import NormLinear

SPLITS = 32
"""Parts of the local tokens whose sums are combined, at most."""


REGISTERS = 255
"""All that a thread can have: without a limit the assembler spills for the sake of occupancy."""


@dataclass(frozen=True)
class Problem:
    """The shape of a call and the form it is computed in."""

    batch: int
    tokens: int
    global_tokens: int
    local_width: int
    global_width: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    absorbed: bool

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def width(self) -> int:
        """Columns of a head's rows in the kernels."""
        return self.local_width if self.absorbed else self.head_dim

    @property
    def narrow(self) -> bool:
        """Whether the streams have 16 bits, for tensor cores."""
        return self.dtype.itemsize == 2

    @property
    def local_projection(self) -> NormLinear:
        rows = self.batch * self.tokens
        return NormLinear(rows, self.local_width, 3 * self.dim, self.dtype, layer_norm=False)

    @property
    def global_projection(self) -> NormLinear:
        rows = self.batch * self.global_tokens
        return NormLinear(rows, self.global_width, 3 * self.dim, self.dtype)

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of PARAMETERS."""
        of_global, of_local, dim = (self.global_width,), (self.local_width,), self.dim
        qkv = ((3 * dim, *of_local), (3 * dim,), (3 * dim, *of_global), (3 * dim,))
        proj = ((*of_local, dim), of_local, (*of_global, dim), of_global)
        return (of_global, of_global, *qkv, *proj, of_local, of_local)

    @property
    def summed_heads(self) -> int:
        """Heads whose results a program of local tokens adds up."""
        return self.heads if self.absorbed else 1

    @property
    def constants(self) -> dict[str, int]:
        """Strides of the heads' rows: T and (B, M, h, Cl) absorbed, else [Q, K, V] of both."""
        strides = (
            (self.local_width, 0, self.heads * self.local_width, self.local_width)
            if self.absorbed
            else (3 * self.dim, self.head_dim, 3 * self.dim, self.head_dim)
        )
        names = ("LOCAL_STRIDE", "LOCAL_STEP", "GLOBAL_STRIDE", "GLOBAL_STEP")
        sizes = {"HEADS": self.heads, "WIDTH": self.width}
        return sizes | dict(zip(names, strides, strict=True))

    @property
    def of_output(self) -> dict[str, int]:
        """Strides of the local result: the new stream absorbed, else the heads concatenated."""
        stride, step = (self.local_width, 0) if self.absorbed else (self.dim, self.head_dim)
        return {"SUMMED_HEADS": self.summed_heads, "OUT_STRIDE": stride, "OUT_STEP": step}


def _local_launch(
    p: Problem,
    kernel: Any,
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    **constants: int,
) -> Launch:
    block_n, block_m, block_d = tile
    chunks = triton.cdiv(p.width, block_d)
    programs = p.batch * p.heads // p.summed_heads * triton.cdiv(p.tokens, block_n) * chunks
    blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block_d}
    constants = p.constants | p.of_output | blocks | constants
    return Launch(kernel, programs, constants, warps, stages, REGISTERS)


def _global_launch(
    p: Problem,
    kernel: Any,
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    chunks: int = 0,
    **constants: int,
) -> tuple[Launch, int]:
    """With the number of splits: two programs for each multiprocessor, but no empty split."""
    block_n, block_m, block_d = tile
    chunks = chunks or triton.cdiv(p.width, block_d)
    programs = p.batch * p.heads * triton.cdiv(p.global_tokens, block_m) * chunks
    blocks = triton.cdiv(p.tokens, block_n)
    wanted = min(SPLITS, blocks, triton.cdiv(2 * MULTIPROCESSORS, programs))
    splits = triton.cdiv(blocks, triton.cdiv(blocks, wanted))
    tiles = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block_d}
    constants = p.constants | tiles | constants
    return Launch(kernel, programs * splits, constants, warps, stages, REGISTERS), splits


def _forward_tile(p: Problem) -> tuple[int, int, int]:
    """(local tokens, global tokens, columns): registers hold the logits and the result."""
    if p.narrow:
        return 64, block(p.global_tokens, 64), block(p.width, 64)
    return 32, block(p.global_tokens, 32), block(p.width, 32)


def _forward_stages(p: Problem) -> int:
    """float32 has no registers for the addresses of a next stage."""
    return 2 if p.narrow else 1


@cached
def to_local_launch(p: Problem) -> Launch:
    warps = 4 if p.narrow and p.width <= 32 else 8
    return _local_launch(p, co_attention_to_local, _forward_tile(p), warps, _forward_stages(p))


@cached
def to_global_launch(p: Problem) -> tuple[Launch, int]:
    """With the number of splits."""
    warps = 4 if p.narrow else 8
    return _global_launch(p, co_attention_to_global, _forward_tile(p), warps, _forward_stages(p))


@cached
def combine_launch(p: Problem) -> Launch:
    block_d = block(p.width, 64)
    rows = p.batch * p.global_tokens * p.heads
    programs = triton.cdiv(rows, 32) * triton.cdiv(p.width, block_d)
    sizes, pack = in_packs(width=p.width)
    constants = {**pack, "BLOCK_T": 32, "BLOCK_D": block_d}
    sizes["heads"] = p.heads
    return Launch(co_attention_combine, programs, constants, warps=4, stages=1, sizes=sizes)


def _backward_tile(p: Problem) -> tuple[int, int, int]:
    """As of the forward, with four results and the operands of six products in the registers."""
    if p.narrow:
        return 16, block(p.global_tokens, 32), block(p.width, 128)
    return 16, 16, block(p.width, 32)


def _backward_warps(p: Problem) -> int:
    return 8 if (p.width > 64 if p.narrow else p.width <= 32) else 4


@cached
def grad_local_launch(p: Problem) -> Launch:
    warps = _backward_warps(p) if p.narrow else 8
    stride = p.heads * p.width
    tile = _backward_tile(p)
    return _local_launch(p, co_attention_grad_local, tile, warps, 1, GRAD_STRIDE=stride)


@cached
def global_sums_launch(p: Problem) -> tuple[Launch, int]:
    """With the number of splits."""
    tile, warps = _backward_tile(p), _backward_warps(p)
    constants = {"GRAD_STRIDE": p.heads * p.width}
    return _global_launch(p, co_attention_global_sums, tile, warps, 1, chunks=1, **constants)


@cached
def grad_global_launch(p: Problem) -> tuple[Launch, int]:
    """With the number of splits."""
    tile, warps = _backward_tile(p), _backward_warps(p)
    of_output = {name: p.of_output[name] for name in ("OUT_STRIDE", "OUT_STEP")}
    units = {"GRAD_STRIDE": p.heads * p.width, "UNITS": 4 if p.absorbed else 3}
    return _global_launch(p, co_attention_grad_global, tile, warps, 1, **of_output, **units)


PARAMETERS = (
    "global_norm_weight",
    "global_norm_bias",
    "local_qkv_weight",
    "local_qkv_bias",
    "global_qkv_weight",
    "global_qkv_bias",
    "local_proj_weight",
    "local_proj_bias",
    "global_proj_weight",
    "global_proj_bias",
    "local_scale",
    "local_shift",
)

GLOBAL_PARAMETERS = (*PARAMETERS[:2], *PARAMETERS[4:6])
"""Of the LayerNorm and the projection of the global tokens."""


def check(
    local: Tensor,
    global_: Tensor,
    num_heads: int,
    parameters: dict[str, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
    absorbed: bool | None,
) -> Problem:
    """The problem, or an error that names the argument."""
    checks.dims("local", local, "BNC")
    checks.dims("global_", global_, "BMC")
    reason = can_run(local, "local")
    if reason is not None:
        raise TypeError(reason)
    checks.same_dtype("local", local, "global_", global_)
    batch, tokens, local_width = local.shape
    _, global_tokens, global_width = global_.shape
    checks.shape("global_", global_, (batch, global_tokens, global_width))
    for name, stream in (("local", local), ("global_", global_)):
        if stream.shape[1:].numel() == 0:
            expected = "expected at least one token and channel"
            raise ValueError(f"{name}: {expected}, got shape {tuple(stream.shape)}")
    checks.dims("local_proj_weight", parameters["local_proj_weight"], "OI")
    dim = parameters["local_proj_weight"].shape[1]
    checks.heads("common width", dim, num_heads)
    head_dim = dim // num_heads
    if checks.head_dim_refusal(head_dim) is not None:
        expected = "expected heads of 8, 16, … 128 channels"
        raise ValueError(f"num_heads: {expected}, got {num_heads} of {head_dim}")
    if absorbed is None:
        absorbed = absorbs(tokens, global_tokens, local_width, num_heads)
    sizes = (batch, tokens, global_tokens, local_width, global_width, num_heads, head_dim)
    p = Problem(*sizes, local.dtype, absorbed)
    for name, shape in zip(PARAMETERS, p.parameter_shapes, strict=True):
        given = checks.optional_shape if name in PARAMETERS[-2:] else checks.shape
        given(name, parameters[name], shape)
    checks.parameters("local", local, **parameters)
    checks.probability("dropout_p", dropout_p)
    checks.seed("seed", seed, "local", local)
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed: expected a tensor beside dropout_p = {dropout_p}, got None")
    return p
