"""Upsampling of the global stream, concatenation with the local one, and their 1×1 mixing.

A 1×1 convolution commutes with bilinear resampling, whose weights sum to one: the global half of
the mixing runs on the coarse grid and is sampled where the local half is finished. Neither the
upsampled stream nor the concatenation exists in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, operators, triton
from .backends import Operation, register, select
from .reference import upsample_concat as reference


def _kernel_refusal(local: Tensor, global_: Tensor) -> str | None:
    """Why the kernels do not take these streams, or None."""
    if local.numel() == 0 and local.shape[0] > 0:
        return "local is empty; the kernel mixes two streams"
    if global_.shape[1] == 0:
        return "global_ has no channels; the kernel mixes two streams"
    return None


def _cpu_can_run(local: Tensor, global_: Tensor) -> str | None:
    return native.cpu_can_run(local, "local") or _kernel_refusal(local, global_)


def _cuda_can_run(local: Tensor, global_: Tensor) -> str | None:
    return native.cuda_can_run(local, "local") or _kernel_refusal(local, global_)


def _triton_can_run(local: Tensor, global_: Tensor) -> str | None:
    return triton.can_run(local, "local") or _kernel_refusal(local, global_)


def _gpu_loses(local: Tensor, global_: Tensor) -> str | None:
    return native.tf32_loss(local, "conv")


OPERATION = register(
    Operation(
        "upsample_concat",
        tensors=("local", "global_"),
        present={
            "cpu": native.cpu_refusal,
            "triton": lambda: triton.REFUSAL,
            "cuda": native.cuda_refusal,
        },
        can_run={"cpu": _cpu_can_run, "triton": _triton_can_run, "cuda": _cuda_can_run},
        loses={"triton": _gpu_loses, "cuda": _gpu_loses},
    )
)

NATIVE, TRITON = "upsample_concat", "upsample_concat_triton"
"""Names of the raw operators; that of the gradient ends in ``_backward``."""


def _fake(local, global_, weight, *others):
    batch, _, height, width = local.shape
    channels = weight.shape[0]
    strides = (height * width * channels, 1, width * channels, channels)
    return local.new_empty_strided((batch, channels, height, width), strides)


def _fake_backward(grad, local, global_, weight, branch_scale):
    dtype = operators.accumulator(local)
    return (
        operators.empty_channels_last(local),
        operators.empty_channels_last(global_),
        local.new_empty(weight.shape, dtype=dtype),
        local.new_empty((weight.shape[0],), dtype=dtype),
    )


for _name in (NATIVE, TRITON):
    operators.define(
        _name,
        "(Tensor local, Tensor global_, Tensor weight, Tensor? bias, Tensor? residual,"
        " Tensor? branch_scale) -> Tensor",
        _fake,
    )
    operators.define(
        f"{_name}_backward",
        "(Tensor grad, Tensor local, Tensor global_, Tensor weight, Tensor? branch_scale)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    )


triton.implement("upsample_concat")


class _UpsampleConcat(torch.autograd.Function):
    """A raw operator under autograd; saves the streams, the weight and the factors."""

    generate_vmap_rule = True

    @staticmethod
    @checks.with_signature
    def forward(local, global_, weight, bias, residual, branch_scale, name):
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(local, global_, weight, bias, residual, branch_scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        local, global_, weight, bias, _, branch_scale, ctx.name = inputs
        ctx.save_for_backward(local, global_, weight, bias, branch_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        local, global_, weight, bias, branch_scale = ctx.saved_tensors
        operator = getattr(torch.ops.dsnet_kernels, f"{ctx.name}_backward")
        grad_local, grad_global, grad_weight, grad_bias = operator(
            grad, local, global_, weight, branch_scale
        )
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        grad_residual = grad if ctx.needs_input_grad[4] else None
        grad_factors = None
        if ctx.needs_input_grad[5]:
            branch = reference(local, global_, weight, bias)
            grad_factors = (grad * branch).sum((1, 2, 3)).to(branch_scale.dtype)
        grad_weight = grad_weight.to(weight.dtype)
        return grad_local, grad_global, grad_weight, grad_bias, grad_residual, grad_factors, None


def upsample_concat(
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    branch_scale: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """residual + branch_scale·Conv1×1(concat[local, bilinear(global_ → H×W)]).

    Bilinear with ``align_corners=False``; local channels first in the concatenation.

    Args:
        local: (B, Cl, H, W), Cl may be 0; float32, float64, bfloat16 or float16. Layouts without
            adjacent channels are copied first.
        global_: (B, Cg, Hg, Wg), Cg may be 0, local's dtype.
        weight: (C, Cl + Cg).
        bias: (C,) or None.
        residual: (B, C, H, W) or None, local's dtype.
        branch_scale: (B,) or None, one factor per image (stochastic depth). Where it wants a
            gradient, every backend recomputes the branch with the reference for it.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside lower-precision streams. Sums and the mixed global stream are
    in float32 (float64 for float64). Under autocast float32 streams are cast to the autocast dtype,
    the parameters are not.

    Returns:
        (B, C, H, W) in local's dtype, channels_last from a kernel.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
        BackendUnavailable: if a named backend cannot run.

    Differentiable once in the streams, the residual and the parameters on every backend
    (``"reference"``: to any order); results and gradients do not depend on the number of threads.

    Source: DS-Net (arXiv 2105.14734), section 3.2, the fusion after inter-scale alignment.
    """
    checks.dims("local", local, "BCHW")
    checks.dims("global_", global_, "BCHW")
    checks.floating("local", local)
    batch, local_width, height, width = local.shape
    global_width, global_height, global_columns = global_.shape[1:]
    checks.shape("global_", global_, (batch, global_width, global_height, global_columns))
    if global_width > 0 and global_height * global_columns == 0:
        raise ValueError(f"global_: expected a non-empty grid, got shape {tuple(global_.shape)}")
    checks.dims("weight", weight, "OI")
    channels = weight.shape[0]
    checks.shape("weight", weight, (channels, local_width + global_width))
    checks.optional_shape("bias", bias, (channels,))
    checks.optional_shape("residual", residual, (batch, channels, height, width))
    checks.optional_shape("branch_scale", branch_scale, (batch,))
    local, global_ = checks.autocast(local), checks.autocast(global_)
    checks.same_dtype("local", local, "global_", global_)
    if residual is not None:
        residual = checks.autocast(residual)
        checks.same_dtype("local", local, "residual", residual)
    checks.parameters("local", local, weight=weight, bias=bias, branch_scale=branch_scale)
    chosen = select(OPERATION, backend, local, global_)
    if chosen == "reference":
        return reference(local, global_, weight, bias, residual, branch_scale=branch_scale)
    name = TRITON if chosen == "triton" else NATIVE
    if not checks.differentiates():
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(local, global_, weight, bias, residual, branch_scale)
    operands = checks.distinct(local, global_, weight, bias, residual, branch_scale)
    return _UpsampleConcat.apply(*operands, name)
