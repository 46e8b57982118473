"""Products with rows of tokens in Triton: the table of tiles, allocation, launches."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MULTIPROCESSORS, Launch, block
from .products_kernels import multiply_rows, multiply_transposed

SLOTS = 32
"""Partial sums of a product over rows, at most."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Columns:
    """``groups`` parts of the rows of a contiguous tensor, ``width`` columns each.

    The first part begins at column ``begin``, the next ``step`` behind.
    """

    tensor: Tensor
    begin: int = 0
    width: int | None = None
    groups: int = 1
    step: int = 0

    @property
    def stride(self) -> int:
        """Columns of a whole row."""
        return self.tensor.shape[-1]

    @property
    def columns(self) -> int:
        return self.stride if self.width is None else self.width

    @property
    def rows(self) -> int:
        return self.tensor.shape[:-1].numel()

    @property
    def pointer(self) -> Tensor:
        return self.tensor.flatten()[self.begin :]


@dataclass(frozen=True)
class Matrices:
    """What a group's rows are multiplied with: rows and columns ``strides`` apart.

    The first group's begins at element ``begin``, the next ``step`` behind.
    """

    tensor: Tensor
    strides: tuple[int, int]
    begin: int = 0
    step: int = 0

    @property
    def pointer(self) -> Tensor:
        return self.tensor.flatten()[self.begin :]


def rows_launch(x: Columns, matrices: Matrices, out: Columns, dtype: torch.dtype) -> Launch:
    """Tiles of 64 rows; float32 operands have little room in shared memory."""
    narrow = dtype.itemsize == 2
    block_t, block_n = 64, block(out.columns, 64)
    constants = {
        "WIDTH": x.columns,
        "OUTPUTS": out.columns,
        "GROUPS": x.groups,
        "X_STRIDE": x.stride,
        "X_GROUP": x.step,
        "M_OUTPUT": matrices.strides[0],
        "M_WIDTH": matrices.strides[1],
        "M_GROUP": matrices.step,
        "OUT_STRIDE": out.stride,
        "OUT_GROUP": out.step,
        "DTYPE": DTYPES[dtype],
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_C": block(x.columns, 64) if narrow else 16,
    }
    programs = triton.cdiv(x.rows, block_t) * triton.cdiv(out.columns, block_n) * x.groups
    return Launch(multiply_rows, programs, constants, warps=4, stages=2)


def multiply(
    x: Columns,
    matrices: Matrices,
    out: Columns,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Fills out = factor·(x·matrixᵀ + weights·bias) + residual, operands rounded to ``dtype``.

    ``bias`` has a value for each group and column, ``weights`` one for each row and group;
    ``residual`` lies as out.
    """
    operands = (x.pointer, matrices.pointer, bias, weights, residual, out.pointer)
    rows_launch(x, matrices, out, dtype)(*operands, x.rows, factor)


def transposed_launch(
    x: Columns, y: Columns, out: Columns, dtype: torch.dtype
) -> tuple[Launch, int]:
    """With the number of slots: two programs for each multiprocessor, but no empty slot."""
    narrow = dtype.itemsize == 2
    block_n, block_c = block(x.columns, 64), block(y.columns, 64)
    block_t = 64 if narrow else 16
    tiles = triton.cdiv(x.columns, block_n) * triton.cdiv(y.columns, block_c) * x.groups
    wanted = triton.cdiv(2 * MULTIPROCESSORS, tiles)
    slots = min(SLOTS, wanted, triton.cdiv(x.rows, block_t))
    constants = {
        "OUTPUTS": x.columns,
        "WIDTH": y.columns,
        "GROUPS": x.groups,
        "X_STRIDE": x.stride,
        "X_GROUP": x.step,
        "Y_STRIDE": y.stride,
        "Y_GROUP": y.step,
        "OUT_STRIDE": y.columns * (x.groups if out.step else 1),
        "OUT_GROUP": out.step or x.columns * y.columns,
        "SIZE": x.groups * x.columns * y.columns,
        "DTYPE": DTYPES[dtype],
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_T": block_t,
    }
    launch = Launch(multiply_transposed, tiles * slots, constants, 4 if narrow else 8, stages=2)
    return launch, slots


def multiply_over_rows(
    x: Columns,
    y: Columns,
    out: Columns,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    sums: Tensor | None = None,
) -> None:
    """Fills out = factor·xᵀ·y, operands rounded to ``dtype``, and ``sums`` = Σ x over the rows.

    ``out`` has float32; its groups' columns are next to each other or, where ``out.step`` is 0, its
    groups' rows below each other.
    """
    launch, slots = transposed_launch(x, y, out, dtype)
    rows, columns = (x.groups, 1) if out.step == 0 else (1, x.groups)
    rows, columns = rows * x.columns, columns * y.columns
    partial = out.tensor.new_empty((slots, rows, columns))
    partial_sums = None if sums is None else sums.new_empty((slots, sums.numel()))
    launch(x.pointer, y.pointer, partial, partial_sums, x.rows, slots, factor)
    torch.sum(partial, 0, out=out.tensor[:, out.begin : out.begin + columns])
    if sums is not None:
        torch.sum(partial_sums, 0, out=sums.view(-1))
