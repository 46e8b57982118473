"""``depthwise_conv3x3`` in Triton: the table of tiles, checks, allocation, launches."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import checks
from . import can_run
from .depthwise_conv3x3_kernels import (
    depthwise_conv3x3_backward,
    depthwise_conv3x3_forward,
    depthwise_conv3x3_sum_slots,
)
from .launch import Launch, cached
from .layout import contiguous

THREADS = 128
"""Of a program."""

SUM_BLOCK = {"BLOCK_SLOTS": 32, "BLOCK_VALUES": 32}

GRADIENT_ROWS = 12
"""Nine taps, bias, scale, shift."""


@dataclass(frozen=True)
class Tiles:
    """How a call is cut into programs; from the shape alone, so that sums do not depend on the GPU.

    Program i handles channel group i % groups, then strip, then columns.
    """

    block_columns: int
    block_channels: int
    groups: int  # across the channels
    strips: int  # down the rows
    rows: int  # of a strip
    column_blocks: int  # along the B·W columns
    column_programs: int  # which take the column blocks in turns
    registers: int  # of a thread, at most

    @property
    def slots(self) -> int:
        """Programs with the same channels, each of which leaves partial sums in the backward."""
        return self.strips * self.column_programs

    @property
    def programs(self) -> int:
        return self.groups * self.slots


def launch_for(shape: torch.Size, *, per_thread: int, max_programs: int, registers: int) -> Tiles:
    """The table of tiles: ``per_thread`` elements of a row for each thread."""
    batch, channels, height, width = shape
    # Up to 32 channels: 64 bytes in 16 bits, limited from below by whole 32-byte sectors and from
    # above by idle channels; 32 divides the channels of every published stage.
    block_channels = min(32, triton.next_power_of_2(channels))
    block_columns = THREADS * per_thread // block_channels
    groups = triton.cdiv(channels, block_channels)
    column_blocks = triton.cdiv(batch * width, block_columns)

    # Strips only while columns alone leave multiprocessors idle (8 programs for each of 132), of at
    # least 8 rows: limited by the two halo rows that each strip loads again.
    wanted = triton.cdiv(8 * 132, groups * column_blocks)
    rows = triton.cdiv(height, max(1, min(wanted, height // 8)))
    strips = triton.cdiv(height, rows)

    turns = triton.cdiv(groups * strips * column_blocks, max_programs)
    column_programs = triton.cdiv(column_blocks, turns)
    return Tiles(
        block_columns,
        block_channels,
        groups,
        strips,
        rows,
        column_blocks,
        column_programs,
        registers,
    )


@cached
def forward_launch(shape: torch.Size, dtype: torch.dtype) -> Tiles:
    """16 bytes per thread and load; 2 elements where C allows no vector: each needs an address.

    Limits: the x dimension of a grid; three programs share a multiprocessor's registers, or five
    where a thread has fewer elements.
    """
    per_thread = 16 // dtype.itemsize if shape[1] % 4 == 0 else 2
    registers = 168 if per_thread == 8 else 96
    return launch_for(shape, per_thread=per_thread, max_programs=2**31 - 1, registers=registers)


@cached
def backward_launch(shape: torch.Size) -> Tiles:
    """Four elements per thread, or 2 where C allows no vector: taps and sums of more would spill.

    Limits: three programs share a multiprocessor's registers, so that 396 run at once on 132; more
    only leave more partial sums.
    """
    per_thread, registers = (4, 168) if shape[1] % 4 == 0 else (2, 128)
    return launch_for(shape, per_thread=per_thread, max_programs=3 * 132, registers=registers)


def _with_adjacent_channels(x: Tensor) -> Tensor:
    """x, or a channels_last copy of it where its channels do not lie next to each other."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _strides(x: Tensor) -> list[int]:
    """Of batch, row and column; 0 where a dimension has one entry."""
    return [0 if x.shape[d] == 1 else x.stride(d) for d in (0, 2, 3)]


def pack_of(*sizes: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all sizes."""
    return math.gcd(8, *sizes)


def _stride_pack(*tensors: Tensor) -> int:
    """What divides strides and addresses, in elements."""
    addresses = [x.data_ptr() // x.element_size() for x in tensors]
    return pack_of(*addresses, *(stride for x in tensors for stride in _strides(x)))


def folds(dtype: torch.dtype, shift: object) -> bool:
    """Whether the forward may fold the affine into taps and constants, which loses digits."""
    return dtype != torch.float32 or shift is None


def registers_for(launch: Tiles, pack: int, stride_pack: int) -> int:
    """The launch's limit, but where C allows vectors and the layout does not.

    Each element of a thread then needs an address. Registers change no bit of a result.
    """
    return launch.registers if stride_pack >= min(pack, 4) else 255


@cached
def kernel_launch(tiles: Tiles, pack: int, stride_pack: int, **flags: bool) -> Launch:
    """The kernel on these tiles; ``flags`` are RESIDUAL and, of the forward alone, FOLD."""
    kernel = depthwise_conv3x3_forward if "FOLD" in flags else depthwise_conv3x3_backward
    constants = {
        **flags,
        "PACK": pack,
        "STRIDE_PACK": stride_pack,
        "BLOCK_COLUMNS": tiles.block_columns,
        "BLOCK_CHANNELS": tiles.block_channels,
    }
    registers = registers_for(tiles, pack, stride_pack)
    return Launch(kernel, tiles.programs, constants, THREADS // 32, 1, registers)


@cached
def sum_slots_launch(count: int) -> Launch:
    programs = triton.cdiv(count, SUM_BLOCK["BLOCK_VALUES"])
    return Launch(depthwise_conv3x3_sum_slots, programs, SUM_BLOCK, THREADS // 32, 1)


def _check(x: Tensor, weight: Tensor, **optional: Tensor | None) -> None:
    checks.dims("x", x, "BCHW")
    if x.shape[1:].numel() == 0:
        raise ValueError(f"x: expected at least one channel and pixel, got shape {tuple(x.shape)}")
    reason = can_run(x)
    if reason is not None:
        raise TypeError(reason)
    channels = x.shape[1]
    checks.shape("weight", weight, (channels, 1, 3, 3))
    for name, parameter in optional.items():
        checks.optional_shape(name, parameter, (channels,))
    checks.parameters("x", x, weight=weight, **optional)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: bool,
) -> Tensor:
    """(B, C, H, W) in channels_last.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    _check(x, weight, bias=bias, scale=scale, shift=shift)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.shape[0] == 0:
        return out
    x = _with_adjacent_channels(x)
    batch, channels, height, width = x.shape
    pack, stride_pack = pack_of(channels), _stride_pack(x)
    tiles = forward_launch(x.shape, x.dtype)
    flags = {"RESIDUAL": residual, "FOLD": folds(x.dtype, shift)}
    with torch.cuda.device_of(x):
        kernel_launch(tiles, pack, stride_pack, **flags)(
            x,
            weight.reshape(channels, 9).contiguous(),
            contiguous(bias),
            contiguous(scale),
            contiguous(shift),
            out,
            channels // pack,
            height,
            width,
            batch * width,
            *(stride // stride_pack for stride in _strides(x)),
            tiles.groups,
            tiles.strips,
            tiles.rows,
        )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x (B, C, H, W) in channels_last, and float32 (12, C): nine taps, bias, scale, shift.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    _check(x, weight, scale=scale, shift=shift)
    checks.shape("grad", grad, tuple(x.shape))
    checks.same_dtype("x", x, "grad", grad)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if batch == 0:
        return grad_x, x.new_zeros((GRADIENT_ROWS, channels), dtype=torch.float32)
    grad, x = _with_adjacent_channels(grad), _with_adjacent_channels(x)
    strides = [*_strides(grad), *_strides(x)]
    pack, stride_pack = pack_of(channels), _stride_pack(grad, x)
    tiles = backward_launch(x.shape)
    partials = x.new_empty((tiles.slots, GRADIENT_ROWS, channels), dtype=torch.float32)
    rows = x.new_empty((GRADIENT_ROWS, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernel_launch(tiles, pack, stride_pack, RESIDUAL=residual)(
            grad,
            x,
            weight.reshape(channels, 9).contiguous(),
            contiguous(scale),
            contiguous(shift),
            grad_x,
            partials,
            channels // pack,
            height,
            width,
            batch * width,
            *(stride // stride_pack for stride in strides),
            tiles.groups,
            tiles.strips,
            tiles.rows,
            tiles.column_blocks,
            tiles.column_programs,
        )
        sum_slots_launch(rows.numel())(partials, rows, tiles.slots, rows.numel())
    return grad_x, rows
