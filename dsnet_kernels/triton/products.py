"""Products with rows of tokens in Triton: the table of tiles, allocation, launches."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MULTIPROCESSORS, Launch, block, cached, in_packs
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
        return _from(self.tensor, self.begin)


@dataclass(frozen=True)
class Matrices:
    """The matrix that multiplies a group's rows; one of its two ``strides`` is 1.

    The first group's begins at element ``begin``, the next ``step`` behind.
    """

    tensor: Tensor
    strides: tuple[int, int]
    begin: int = 0
    step: int = 0

    @property
    def pointer(self) -> Tensor:
        return _from(self.tensor, self.begin)


def _from(tensor: Tensor, begin: int) -> Tensor:
    """A contiguous tensor from element ``begin`` on, for a kernel that knows its strides."""
    if begin == 0:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + begin)


@cached
def rows_launch(
    rows: int,
    groups: int,
    x: tuple[int, int, int],
    matrix: tuple[int, int, int],
    out: tuple[int, int, int],
    dtype: torch.dtype,
) -> Launch:
    """Tiles of 64 rows; float32 operands have little room in shared memory.

    ``x`` and ``out`` are their columns, the stride of their rows and the step of their groups,
    ``matrix`` are the strides of rows and columns and the step of its groups.
    """
    (width, x_stride, x_group), (m_output, m_width, m_group) = x, matrix
    outputs, out_stride, out_group = out
    narrow = dtype.itemsize == 2
    block_t, block_n = 64, block(outputs, 64)
    sizes, pack = in_packs(
        width=width,
        outputs=outputs,
        x_stride=x_stride,
        x_group=x_group,
        m_stride=m_output if m_width == 1 else m_width,
        m_group=m_group,
        out_stride=out_stride,
        out_group=out_group,
    )
    constants = {
        "BY_ROW": m_width == 1,
        "DTYPE": DTYPES[dtype],
        **pack,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_C": block(width, 64) if narrow else 16,
    }
    programs = triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_n) * groups
    sizes["groups"] = groups
    # Without a limit the assembler spills some registers for the sake of more programs.
    registers = None if narrow else 128 if pack["PACK"] > 1 else 255
    return Launch(multiply_rows, programs, constants, 4, 2, registers, sizes)


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
    rows = x.rows
    of_x, of_out = (x.columns, x.stride, x.step), (out.columns, out.stride, out.step)
    launch = rows_launch(rows, x.groups, of_x, (*matrices.strides, matrices.step), of_out, dtype)
    launch(*operands, rows, factor)


@cached
def transposed_launch(
    rows: int,
    groups: int,
    x: tuple[int, int, int],
    y: tuple[int, int, int],
    out_step: int,
    dtype: torch.dtype,
) -> tuple[Launch, int]:
    """With the number of slots: two programs for each multiprocessor, but no empty slot.

    ``x`` and ``y`` are their columns, the stride of their rows and the step of their groups;
    ``out_step`` is the step of the result's groups, or 0 where they lie below each other.
    """
    (outputs, x_stride, x_group), (width, y_stride, y_group) = x, y
    narrow = dtype.itemsize == 2
    block_n, block_c = block(outputs, 64), block(width, 64)
    block_t = 64 if narrow else 16
    tiles = triton.cdiv(outputs, block_n) * triton.cdiv(width, block_c) * groups
    wanted = triton.cdiv(2 * MULTIPROCESSORS, tiles)
    slots = min(SLOTS, wanted, triton.cdiv(rows, block_t))
    sizes, pack = in_packs(
        outputs=outputs,
        width=width,
        x_stride=x_stride,
        x_group=x_group,
        y_stride=y_stride,
        y_group=y_group,
        out_stride=width * (groups if out_step else 1),
        out_group=out_step or outputs * width,
    )
    constants = {
        "DTYPE": DTYPES[dtype],
        **pack,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_T": block_t,
    }
    sizes["groups"] = groups
    warps, registers = (4, None) if narrow else (8, 128)
    programs = tiles * slots
    launch = Launch(multiply_transposed, programs, constants, warps, 2, registers, sizes)
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
    of_x, of_y = (x.columns, x.stride, x.step), (y.columns, y.stride, y.step)
    launch, slots = transposed_launch(x.rows, x.groups, of_x, of_y, out.step, dtype)
    rows, columns = (x.groups, 1) if out.step == 0 else (1, x.groups)
    rows, columns = rows * x.columns, columns * y.columns
    partial = out.tensor.new_empty((slots, rows, columns))
    partial_sums = None if sums is None else sums.new_empty((slots, sums.numel()))
    launch(x.pointer, y.pointer, partial, partial_sums, x.rows, slots, factor)
    torch.sum(partial, 0, out=out.tensor[:, out.begin : out.begin + columns])
    if sums is not None:
        torch.sum(partial_sums, 0, out=sums.view(-1))
