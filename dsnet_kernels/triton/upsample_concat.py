"""``upsample_concat`` in Triton: the table of tiles, checks, allocation, launches."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import checks
from . import can_run
from .launch import Launch, block, cached, in_packs
from .layout import contiguous, image_of, rows_of
from .products import Columns, Matrices, multiply, multiply_over_rows
from .upsample_concat_kernels import upsample_concat_adjoint, upsample_concat_forward


@dataclass(frozen=True)
class Problem:
    """The shape of a call."""

    batch: int
    grid: tuple[int, int]
    coarse: tuple[int, int]
    local: int
    global_: int
    channels: int
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        return self.batch * self.grid[0] * self.grid[1]


@cached
def forward_launch(p: Problem) -> Launch:
    """Tiles of 64 pixels; two corners of a tile in float32 are in registers at a time."""
    block_n = block(p.channels, 64)
    constants = {
        "LOCAL_WIDTH": p.local,
        "GLOBAL_WIDTH": p.global_,
        "CHANNELS": p.channels,
        "BLOCK_T": 64,
        "BLOCK_N": block_n,
        "BLOCK_C": block(p.local, 64) if p.dtype.itemsize == 2 else 16,
    }
    programs = triton.cdiv(p.pixels, 64) * triton.cdiv(p.channels, block_n)
    return Launch(upsample_concat_forward, programs, constants, warps=8, stages=2)


@cached
def adjoint_launch(rows: int, channels: int) -> Launch:
    """2048 sums in a program: 16 in each thread, limited by the registers of their addresses."""
    block_n = block(channels, 64)
    block_t = 2048 // block_n
    sizes, pack = in_packs(channels=channels)
    constants = {**pack, "BLOCK_T": block_t, "BLOCK_N": block_n}
    programs = triton.cdiv(rows, block_t) * triton.cdiv(channels, block_n)
    return Launch(
        upsample_concat_adjoint,
        programs,
        constants,
        warps=4,
        stages=1,
        registers=255,
        sizes=sizes,
    )


def _check(local: Tensor, global_: Tensor, weight: Tensor, **others: Tensor | None) -> Problem:
    checks.dims("local", local, "BCHW")
    checks.dims("global_", global_, "BCHW")
    checks.dims("weight", weight, "OI")
    reason = can_run(local, "local")
    if reason is not None:
        raise TypeError(reason)
    checks.same_dtype("local", local, "global_", global_)
    (batch, width, *grid), (_, global_width, *coarse) = local.shape, global_.shape
    checks.shape("global_", global_, (batch, global_width, *coarse))
    for name, tensor in (("local", local), ("global_", global_)):
        if tensor.shape[1:].numel() == 0:
            expected = "expected at least one channel and pixel"
            raise ValueError(f"{name}: {expected}, got shape {tuple(tensor.shape)}")
    channels = weight.shape[0]
    checks.shape("weight", weight, (channels, width + global_width))
    checks.optional_shape("branch_scale", others["branch_scale"], (batch,))
    checks.optional_shape("bias", others.get("bias"), (channels,))
    checks.parameters("local", local, weight=weight, **others)
    return Problem(batch, tuple(grid), tuple(coarse), width, global_width, channels, local.dtype)


def forward(
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    branch_scale: Tensor | None,
) -> Tensor:
    """(B, C, H, W) in channels_last.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    p = _check(local, global_, weight, bias=bias, branch_scale=branch_scale)
    if residual is not None:
        checks.shape("residual", residual, (p.batch, p.channels, *p.grid))
        checks.same_dtype("local", local, "residual", residual)
        residual = rows_of(residual)
    out = local.new_empty((p.batch, *p.grid, p.channels))
    if out.numel() == 0:
        return image_of(out)
    weight = weight.contiguous()
    mixed = local.new_empty((p.batch, *p.coarse, p.channels), dtype=torch.float32)
    with torch.cuda.device_of(local):
        matrix = Matrices(weight, (p.local + p.global_, 1), begin=p.local)
        multiply(Columns(rows_of(global_)), matrix, Columns(mixed), p.dtype)
        forward_launch(p)(
            rows_of(local),
            mixed,
            weight,
            contiguous(bias),
            residual,
            contiguous(branch_scale),
            out,
            p.pixels,
            *p.grid,
            *p.coarse,
        )
    return image_of(out)


def backward(
    grad: Tensor,
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    branch_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_local and grad_global in channels_last, and in float32 (C, Cl + Cg) and (C).

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    p = _check(local, global_, weight, branch_scale=branch_scale)
    checks.shape("grad", grad, (p.batch, p.channels, *p.grid))
    checks.same_dtype("local", local, "grad", grad)
    if grad.numel() == 0:
        streams = ((p.batch, *p.grid, p.local), (p.batch, *p.coarse, p.global_))
        sums = (weight.new_zeros(s, dtype=torch.float32) for s in (weight.shape, (p.channels,)))
        return *(image_of(local.new_zeros(shape)) for shape in streams), *sums
    if branch_scale is not None:
        grad = grad * branch_scale.to(grad.dtype).view(-1, 1, 1, 1)
    grad, local, global_ = rows_of(grad), rows_of(local), rows_of(global_)
    weight = weight.contiguous()
    grad_local, grad_global = torch.empty_like(local), torch.empty_like(global_)
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    grad_bias = weight.new_empty((p.channels,), dtype=torch.float32)
    with torch.cuda.device_of(local):
        grad_mixed = _adjoint(p, grad)
        # The weights of a sample sum to one: the few rows of the coarse grid have the bias's
        # gradient too.
        for x, grad_x, grad_y, begin, sums in (
            (local, grad_local, grad, 0, None),
            (global_, grad_global, grad_mixed, p.local, grad_bias),
        ):
            matrix = Matrices(weight, (1, p.local + p.global_), begin)
            multiply(Columns(grad_y), matrix, Columns(grad_x), p.dtype)
            out = Columns(grad_weight, begin)
            multiply_over_rows(Columns(grad_y), Columns(x), out, p.dtype, sums=sums)
    return image_of(grad_local), image_of(grad_global), grad_weight, grad_bias


def _adjoint(p: Problem, grad: Tensor) -> Tensor:
    """(B, Hg, Wg, C) in float32 from (B, H, W, C): along the columns, then along the rows."""
    (height, width), (coarse_height, coarse_width) = p.grid, p.coarse
    shape = (p.batch, height, coarse_width, p.channels)
    columns = grad.new_empty(shape, dtype=torch.float32)
    rows = columns.shape[:3].numel()
    adjoint_launch(rows, p.channels)(grad, columns, rows, width, coarse_width, 1)
    mixed = grad.new_empty((p.batch, *p.coarse, p.channels), dtype=torch.float32)
    rows = mixed.shape[:3].numel()
    adjoint_launch(rows, p.channels)(columns, mixed, rows, height, coarse_height, coarse_width)
    return mixed
