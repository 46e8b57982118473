"""Depthwise 3×3 convolution with an affine before it and a residual after it.

The kernels' forward reads x once and writes the output once; their backward reads the output's
gradient and x once each, writes x's gradient once and gathers all parameter gradients on the way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, operators, triton
from .backends import Operation, register, select
from .reference import depthwise_conv3x3 as reference

OPERATION = register(
    Operation(
        "depthwise_conv3x3",
        tensors=("x",),
        present={
            "cpu": native.cpu_refusal,
            "triton": lambda: triton.REFUSAL,
            "cuda": native.cuda_refusal,
        },
        can_run={
            "cpu": native.cpu_can_run,
            "triton": triton.can_run,
            "cuda": native.cuda_can_run,
        },
    )
)

NATIVE, TRITON = "depthwise_conv3x3", "depthwise_conv3x3_triton"
"""Names of the raw operators; that of the gradient ends in ``_backward``."""


def _fake(x, weight, bias, scale, shift, residual):
    return operators.empty_channels_last(x)


def _fake_backward(grad, x, weight, scale, shift, residual):
    parameters = x.new_empty((12, x.shape[1]), dtype=operators.accumulator(x))
    return operators.empty_channels_last(x), parameters


def _batched(operator, info, in_dims, args):
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return operators.one_by_one(operator, info, in_dims, args)
    x = args[0].movedim(in_dims[0], 0)
    return operator(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


for _name in (NATIVE, TRITON):
    operators.define(
        _name,
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, bool residual)"
        " -> Tensor",
        _fake,
        _batched,
    )
    operators.define(
        f"{_name}_backward",
        "(Tensor grad, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool residual)"
        " -> (Tensor, Tensor)",
        _fake_backward,
    )


triton.implement("depthwise_conv3x3")


class _DepthwiseConv3x3(torch.autograd.Function):
    """A raw operator under autograd; saves x and the parameters, no activation of its own."""

    generate_vmap_rule = True

    @staticmethod
    @checks.with_signature
    def forward(x, weight, bias, scale, shift, residual, name):
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(x, weight, bias, scale, shift, residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, scale, shift, ctx.residual, ctx.name = inputs
        ctx.save_for_backward(x, weight, bias, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, scale, shift = ctx.saved_tensors
        operator = getattr(torch.ops.dsnet_kernels, f"{ctx.name}_backward")
        grad_x, rows = operator(grad, x, weight, scale, shift, ctx.residual)
        # Rows of per-channel gradients: nine taps, then bias, scale and shift.
        grad_weight = rows[:9].t().reshape(weight.shape).to(weight.dtype)
        grad_bias, grad_scale, grad_shift = (
            None if parameter is None else row.to(parameter.dtype)
            for parameter, row in zip((bias, scale, shift), rows[9:].unbind(0), strict=True)
        )
        return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None, None


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """out[b,c,i,j] = Σ_{u,v} w[c,u,v]·z[b,c,i+u−1,j+v−1] + bias[c] (+ x[b,c,i,j]).

    z = scale·x + shift inside the image and 0 outside it: the affine, a folded BatchNorm, comes
    before the zero padding.

    Args:
        x: (B, C, H, W), B may be 0; float32, float64, bfloat16 or float16. ``channels_last`` and
            channel slices of it are read in place; any other strides are copied first.
        weight: (C, 1, 3, 3).
        bias: (C,) or None.
        scale: (C,) or None for 1.
        shift: (C,) or None for 0.
        residual: add x to the result.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside a lower-precision x. Sums are in float32 (float64 for float64).
    Under autocast a float32 x is cast to the autocast dtype, the parameters are not.

    Returns:
        (B, C, H, W) in x's dtype; ``channels_last`` from a kernel, as the reference's convolution
        leaves it otherwise.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
        BackendUnavailable: if a named backend cannot run.

    Differentiable once in x, weight, bias, scale and shift on every backend (``"reference"``: to
    any order), also under ``torch.func.vmap``; results and gradients do not depend on the number
    of threads.

    Source: DS-Net (arXiv 2105.14734), section 3.1: the local stream, and the position encoding.
    """
    checks.dims("x", x, "BCHW")
    checks.floating("x", x)
    channels, height, width = x.shape[1:]
    if channels * height * width == 0:
        raise ValueError(f"x: expected at least one channel and pixel, got shape {tuple(x.shape)}")
    checks.shape("weight", weight, (channels, 1, 3, 3))
    checks.optional_shape("bias", bias, (channels,))
    checks.optional_shape("scale", scale, (channels,))
    checks.optional_shape("shift", shift, (channels,))
    x = checks.autocast(x)
    checks.parameters("x", x, weight=weight, bias=bias, scale=scale, shift=shift)
    chosen = select(OPERATION, backend, x)
    if chosen == "reference":
        return reference(x, weight, bias, scale=scale, shift=shift, residual=residual)
    name = TRITON if chosen == "triton" else NATIVE
    if not checks.differentiates():
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(x, weight, bias, scale, shift, residual)
    return _DepthwiseConv3x3.apply(*checks.distinct(x, weight, bias, scale, shift), residual, name)
