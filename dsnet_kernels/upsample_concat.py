"""Upsampling of the global stream, concatenation with the local one, and their 1×1 mixing."""

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .backends import Operation, register, select
from .reference import upsample_concat as reference

OPERATION = register(Operation("upsample_concat", tensors=("local", "global_")))


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
        local: (B, Cl, H, W), Cl may be 0; float32, float64, bfloat16 or float16.
        global_: (B, Cg, Hg, Wg), Cg may be 0, local's dtype.
        weight: (C, Cl + Cg).
        bias: (C,) or None.
        residual: (B, C, H, W) or None, local's dtype.
        branch_scale: (B,) or None, one factor per image (stochastic depth).
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside lower-precision streams.

    Returns:
        (B, C, H, W) in local's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
        BackendUnavailable: if a named backend cannot run.

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
    select(OPERATION, backend, local, global_)
    return reference(local, global_, weight, bias, residual, branch_scale=branch_scale)
