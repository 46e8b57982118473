"""A linear map of normalised tokens in Triton: the table of tiles, allocation, launches."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .launch import MULTIPROCESSORS, Launch, block, cached, in_packs
from .norm_linear_kernels import (
    norm_linear,
    norm_linear_grad_weight,
    norm_linear_grad_x,
    norm_linear_sum_slots,
)

SLOTS = 32
"""Partial sums of a parameter's gradient, at most: the last kernel reads them at once."""

WHOLE_ROWS = 512
"""Channels up to which the gradient through a LayerNorm keeps its rows in registers."""


@dataclass(frozen=True)
class NormLinear:
    """(n∘norm_weight + norm_bias)·Wᵀ + b of T rows; n is their LayerNorm, or they themselves."""

    rows: int
    width: int
    outputs: int
    dtype: torch.dtype
    layer_norm: bool = True

    @property
    def narrow(self) -> bool:
        """Whether x has 16 bits, for tensor cores; float32 has its products on the other ones."""
        return self.dtype.itemsize == 2

    @property
    def constants(self) -> dict[str, int]:
        """Sizes of the kernels that would need more registers if they were arguments."""
        return {"WIDTH": self.width, "OUTPUTS": self.outputs, "LAYER_NORM": self.layer_norm}


@cached
def forward_launch(p: NormLinear) -> Launch:
    block_t, block_n, block_c = (64, 64, block(p.width, 64)) if p.narrow else (64, 64, 16)
    programs = triton.cdiv(p.rows, block_t) * triton.cdiv(p.outputs, block_n)
    constants = p.constants | {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_C": block_c}
    return Launch(norm_linear, programs, constants, warps=4, stages=2)


@cached
def grad_x_launch(p: NormLinear) -> Launch:
    """Blocks of whole rows up to WHOLE_ROWS channels; 8192 sums are what registers hold."""
    block_c = block(p.width, WHOLE_ROWS)
    block_t = max(16, min(64, 8192 // block_c))
    block_n = 32 if p.narrow else 16
    constants = p.constants | {"BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_N": block_n}
    warps = 4 if p.narrow and block_c < 256 else 8
    programs = triton.cdiv(p.rows, block_t)
    return Launch(norm_linear_grad_x, programs, constants, warps, stages=2)


@cached
def grad_weight_launch(p: NormLinear) -> tuple[Launch, int]:
    """With the number of slots: two programs for each multiprocessor, but no empty slot."""
    block_n, block_c = block(p.outputs, 64), block(p.width, 64)
    block_t = 64 if p.narrow else 16
    tiles = triton.cdiv(p.outputs, block_n) * triton.cdiv(p.width, block_c)
    wanted = triton.cdiv(2 * MULTIPROCESSORS, tiles)
    slots = min(SLOTS, wanted, triton.cdiv(p.rows, block_t))
    sizes, pack = in_packs(width=p.width, outputs=p.outputs)
    constants = pack | {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_T": block_t}
    warps, programs = 4 if p.narrow else 8, tiles * slots
    launch = Launch(norm_linear_grad_weight, programs, constants, warps, stages=2, sizes=sizes)
    return launch, slots


@cached
def sum_slots_launch(p: NormLinear, slots: int) -> tuple[Launch, int]:
    """With the number of blocks of rows of W, each of which leaves sums for the norm."""
    # 8192 values of all slots in a program, limited by registers.
    block_slots = triton.next_power_of_2(slots)
    block_n, block_c = min(64, 256 // block_slots), 32
    blocks = triton.cdiv(p.outputs, block_n)
    sizes, pack = in_packs(width=p.width, outputs=p.outputs)
    constants = pack | {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_SLOTS": block_slots}
    programs = blocks * triton.cdiv(p.width, block_c)
    launch = Launch(norm_linear_sum_slots, programs, constants, warps=4, stages=1, sizes=sizes)
    return launch, blocks


def forward(
    p: NormLinear, x: Tensor, parameters: list[Tensor | None], y: Tensor, eps: float
) -> Tensor:
    """Fills y (…, O), in its dtype.

    ``parameters`` are norm_weight, norm_bias, linear_weight and linear_bias; the first two may be
    None without a LayerNorm. All tensors are contiguous.
    """
    forward_launch(p)(x, *parameters, y, p.rows, eps)
    return y


def backward(
    p: NormLinear,
    grad: Tensor,
    x: Tensor,
    grad_y: Tensor,
    parameters: list[Tensor | None],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad plus what comes through y, in x's dtype, and of the parameters in float32.

    Those of norm_weight and norm_bias are there even where the parameters are not.
    """
    norm_weight, _, linear_weight, _ = parameters
    grad_x = torch.empty_like(x)
    statistics = _sums(x, 2, p.rows) if p.layer_norm else None
    grad_x_launch(p)(grad, x, grad_y, norm_weight, linear_weight, grad_x, statistics, p.rows, eps)
    return grad_x, *grad_parameters(p, x, grad_y, parameters, statistics)


def grad_parameters(
    p: NormLinear,
    x: Tensor,
    grad_y: Tensor,
    parameters: list[Tensor | None],
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the parameters; ``statistics`` are mean and rstd (2, T) for a LayerNorm."""
    launch, slots = grad_weight_launch(p)
    partial_weight, partial_bias = _sums(x, slots, p.outputs, p.width), _sums(x, slots, p.outputs)
    launch(x, grad_y, statistics, partial_weight, partial_bias, p.rows, slots)

    norm_weight, norm_bias, linear_weight, _ = parameters
    launch, blocks = sum_slots_launch(p, slots)
    grad_weight, grad_bias = _sums(x, p.outputs, p.width), _sums(x, p.outputs)
    partial_norm = _sums(x, blocks, 2, p.width)
    launch(
        partial_weight,
        partial_bias,
        norm_weight,
        norm_bias,
        linear_weight,
        grad_y,
        grad_weight,
        grad_bias,
        partial_norm,
        slots,
    )
    grad_norm = (partial_norm[:, i].sum(0) for i in range(2))
    return *grad_norm, grad_weight, grad_bias


def _sums(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
