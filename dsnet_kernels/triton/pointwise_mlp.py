"""``pointwise_mlp`` in Triton: the table of tiles, checks, allocation, launches.

Few channels in 16 bits take kernels that keep the hidden activations on the chip. Others, and
float32, whose products on FMA units outweigh memory, take one launch per product.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import checks
from . import can_run, norm_linear
from .launch import MULTIPROCESSORS, Launch, block, cached
from .layout import contiguous, image_of, rows_of
from .norm_linear import NormLinear
from .pointwise_mlp_fused_kernels import (
    pointwise_mlp_forward,
    pointwise_mlp_grad_weights,
    pointwise_mlp_grad_x,
)
from .pointwise_mlp_kernels import (
    pointwise_mlp_grad_hidden,
    pointwise_mlp_hidden,
    pointwise_mlp_residual,
)
from .products import Columns, multiply_over_rows

FUSED_WIDTH = 128
"""Channels up to which a program has registers for whole rows and their sums."""

SLOTS = 128
"""Partial sums of the weights' gradients of few channels, at most."""


@dataclass(frozen=True)
class Problem:
    """The shape of a call: T rows of ``width`` channels, ``pixels`` of them in an image."""

    rows: int
    pixels: int
    width: int
    hidden: int
    dtype: torch.dtype

    @property
    def narrow(self) -> bool:
        """Whether x has 16 bits, for tensor cores; float32 has its products on the other ones."""
        return self.dtype.itemsize == 2

    @property
    def fused(self) -> bool:
        """Whether the hidden activations can stay on the chip."""
        return self.narrow and self.width <= FUSED_WIDTH

    @property
    def kept(self) -> int:
        """Elements of the hidden activations that the backward reads, rows in whole sixteens."""
        return triton.cdiv(self.rows, 16) * 16 * self.hidden

    @property
    def first(self) -> NormLinear:
        """The first product, of which only the gradients of the parameters are taken."""
        return NormLinear(self.rows, self.width, self.hidden, self.dtype, layer_norm=False)

    @property
    def sizes(self) -> dict[str, int]:
        return {"WIDTH": self.width, "HIDDEN": self.hidden}


def _fused_constants(p: Problem, block_t: int) -> dict[str, int]:
    """Chunks of 64 hidden channels, or of 32 beside sums that take most of the registers."""
    block_r = block(p.hidden, 64 if p.width <= 64 else 32)
    return p.sizes | {"BLOCK_T": block_t, "BLOCK_C": block(p.width), "BLOCK_R": block_r}


def _rows_launch(p: Problem, kernel: Any) -> Launch:
    """128 rows for each pass over the weights where that leaves no multiprocessor idle."""
    block_t = 128 if p.rows >= 128 * MULTIPROCESSORS else 64
    programs, constants = triton.cdiv(p.rows, block_t), _fused_constants(p, block_t)
    return Launch(kernel, programs, constants, warps=block_t // 16, stages=2)


@cached
def forward_launch(p: Problem) -> Launch:
    return _rows_launch(p, pointwise_mlp_forward)


@cached
def grad_x_launch(p: Problem) -> Launch:
    return _rows_launch(p, pointwise_mlp_grad_x)


@cached
def grad_weights_launch(p: Problem) -> tuple[Launch, int]:
    """With the number of slots: two programs for each multiprocessor, but no empty slot."""
    block_t = 32
    constants = _fused_constants(p, block_t)
    chunks = triton.cdiv(p.hidden, constants["BLOCK_R"])
    wanted = triton.cdiv(2 * MULTIPROCESSORS, chunks)
    slots = min(SLOTS, wanted, triton.cdiv(p.rows, block_t))
    return Launch(pointwise_mlp_grad_weights, chunks * slots, constants, warps=4, stages=3), slots


def _product_launch(
    p: Problem, kernel: Any, width: int, outputs: int, columns: int, constants: dict[str, int]
) -> Launch:
    """Blocks of 64 rows and columns, larger ones where these leave no multiprocessor idle.

    ``columns`` are what registers hold of 128 rows.
    """
    block_t, block_n, block_c = 64, block(outputs, 64), block(width, 64) if p.narrow else 16
    if p.narrow and p.rows * outputs >= 128 * 128 * MULTIPROCESSORS:
        # Not where more columns would be padding.
        block_t, block_n = 128, columns if outputs % columns == 0 else block_n
    constants = constants | {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_C": block_c}
    programs = triton.cdiv(p.rows, block_t) * triton.cdiv(outputs, block_n)
    if p.narrow:
        return Launch(kernel, programs, constants, warps=block_t // 16, stages=3)
    # Without a limit the assembler spills some registers for the sake of more programs.
    return Launch(kernel, programs, constants, warps=4, stages=2, registers=128)


@cached
def hidden_launch(p: Problem) -> Launch:
    return _product_launch(p, pointwise_mlp_hidden, p.width, p.hidden, 128, p.sizes)


@cached
def grad_hidden_launch(p: Problem) -> Launch:
    return _product_launch(p, pointwise_mlp_grad_hidden, p.width, p.hidden, 64, p.sizes)


@cached
def residual_launch(p: Problem, strides: tuple[int, int]) -> Launch:
    """From hidden channels to those of x, by a matrix whose rows and columns are ``strides`` apart.

    ``strides`` are (R, 1) for W₂ and (1, C) for W₁ᵀ.
    """
    output, width = strides
    constants = {"WIDTH": p.hidden, "OUTPUTS": p.width, "M_OUTPUT": output, "M_WIDTH": width}
    return _product_launch(p, pointwise_mlp_residual, p.hidden, p.width, 128, constants)


def _check(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, **others: Tensor | None) -> Problem:
    checks.dims("x", x, "BCHW")
    checks.dims("fc1_weight", fc1_weight, "OI")
    reason = can_run(x)
    if reason is not None:
        raise TypeError(reason)
    batch, channels, height, width = x.shape
    hidden = fc1_weight.shape[0]
    if fc1_weight.numel() == 0:
        expected = "expected at least one row and column"
        raise ValueError(f"fc1_weight: {expected}, got shape {tuple(fc1_weight.shape)}")
    checks.shape("fc1_weight", fc1_weight, (hidden, channels))
    checks.shape("fc2_weight", fc2_weight, (channels, hidden))
    sizes = {"fc1_bias": hidden, "branch_scale": batch}
    for name, tensor in others.items():
        checks.optional_shape(name, tensor, (sizes.get(name, channels),))
    checks.parameters("x", x, fc1_weight=fc1_weight, fc2_weight=fc2_weight, **others)
    return Problem(batch * height * width, height * width, channels, hidden, x.dtype)


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    branch_scale: Tensor | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) in channels_last, and what is before GELU, (T, R) in one row.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    vectors = {"fc1_bias": fc1_bias, "fc2_bias": fc2_bias, "scale": scale, "shift": shift}
    p = _check(x, fc1_weight, fc2_weight, **vectors, branch_scale=branch_scale)
    x = rows_of(x)
    out, hidden = torch.empty_like(x), x.new_empty((p.kept if keep_hidden else 0,))
    if out.numel() == 0:
        return image_of(out), hidden
    fc1_weight, fc2_weight = (w.to(p.dtype).contiguous() for w in (fc1_weight, fc2_weight))
    fc1_bias, fc2_bias, scale, shift = map(contiguous, vectors.values())
    branch_scale = contiguous(branch_scale)
    kept = hidden if keep_hidden else None
    with torch.cuda.device_of(x):
        if p.fused:
            parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale)
            forward_launch(p)(x, *parameters, kept, out, p.rows, p.pixels)
        else:
            activated = x.new_empty((p.rows, p.hidden))
            hidden_launch(p)(x, scale, shift, fc1_weight, fc1_bias, kept, activated, p.rows)
            operands = (activated, fc2_weight, fc2_bias, None, branch_scale, x, out)
            residual_launch(p, (p.hidden, 1))(*operands, p.rows, p.pixels)
    return image_of(out), hidden


def backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    branch_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x in channels_last and, in float32, those of both weights and biases, scale and shift.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
    """
    vectors = {"fc1_bias": fc1_bias, "scale": scale, "shift": shift}
    p = _check(x, fc1_weight, fc2_weight, **vectors, branch_scale=branch_scale)
    checks.shape("grad", grad, tuple(x.shape))
    checks.same_dtype("x", x, "grad", grad)
    if hidden is not None:
        checks.shape("hidden", hidden, (p.kept,))
        checks.same_dtype("x", x, "hidden", hidden)
    grad, x = rows_of(grad), rows_of(x)
    if x.numel() == 0:
        sizes = ((p.hidden, p.width), (p.hidden,), (p.width, p.hidden), *((p.width,),) * 3)
        sums = (x.new_zeros(size, dtype=torch.float32) for size in sizes)
        return image_of(torch.empty_like(x)), *sums
    fc1_weight, fc2_weight = (w.to(p.dtype).contiguous() for w in (fc1_weight, fc2_weight))
    fc1_bias, scale, shift = map(contiguous, vectors.values())
    parameters = (fc1_weight, fc1_bias, fc2_weight, scale, shift)
    grad_branch = grad
    if branch_scale is not None:
        grad_branch = grad * branch_scale.to(p.dtype).view(-1, 1, 1, 1)
    with torch.cuda.device_of(x):
        if p.fused and hidden is None:
            grad_x, *grads = _fused_gradients(p, grad, grad_branch, x, *parameters)
        else:
            grad_x, *grads = _gradients(p, grad, grad_branch, x, hidden, *parameters)
    return image_of(grad_x), *grads


def _fused_gradients(
    p: Problem,
    grad: Tensor,
    grad_branch: Tensor,
    x: Tensor,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients with the hidden activations computed again."""
    launch = grad_x_launch(p)
    grad_x, sums = torch.empty_like(x), _sums(x, launch.programs, 3, p.width)
    launch(grad, grad_branch, x, *parameters, grad_x, sums, p.rows)
    # One sum each: an operator's outputs must not share memory.
    grad_fc2_bias, grad_scale, grad_shift = (sums[:, i].sum(0) for i in range(3))

    launch, slots = grad_weights_launch(p)
    sizes = ((p.hidden, p.width), (p.hidden,), (p.width, p.hidden))
    partials = [_sums(x, slots, *size) for size in sizes]
    launch(grad_branch, x, *parameters, *partials, p.rows, slots)
    grad_weights = (partial.sum(0) for partial in partials)
    return grad_x, *grad_weights, grad_fc2_bias, grad_scale, grad_shift


def _gradients(
    p: Problem,
    grad: Tensor,
    grad_branch: Tensor,
    x: Tensor,
    hidden: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients with the hidden activations and theirs in memory."""
    if hidden is None:
        hidden = x.new_empty((p.kept,))
        hidden_launch(p)(x, scale, shift, fc1_weight, fc1_bias, hidden, None, p.rows)
    activated, grad_hidden = (x.new_empty((p.rows, p.hidden)) for _ in range(2))
    grad_hidden_launch(p)(grad_branch, fc2_weight, hidden, activated, grad_hidden, p.rows)

    grad_fc2, grad_fc2_bias = _sums(x, p.width, p.hidden), _sums(x, p.width)
    columns = (Columns(grad_branch), Columns(activated), Columns(grad_fc2))
    multiply_over_rows(*columns, p.dtype, sums=grad_fc2_bias)

    grad_x = torch.empty_like(x)
    operands = (grad_hidden, fc1_weight, None, scale, None, grad, grad_x)
    residual_launch(p, (1, p.width))(*operands, p.rows, p.pixels)
    grad_scale, grad_shift, *grad_fc1 = norm_linear.grad_parameters(
        p.first, x, grad_hidden, [scale, shift, fc1_weight, None]
    )
    return grad_x, *grad_fc1, grad_fc2, grad_fc2_bias, grad_scale, grad_shift


def _sums(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
