"""The block's MLP of two 1×1 convolutions, with its normalisation and residual."""

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .backends import Operation, register, select
from .reference import pointwise_mlp as reference

OPERATION = register(Operation("pointwise_mlp", tensors=("x",)))


def pointwise_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """x + branch_scale·(W₂·GELU(W₁·(scale·x + shift) + b₁) + b₂) at every pixel.

    GELU is the exact one, u·Φ(u) with Φ through erf.

    Args:
        x: (B, C, H, W); float32, float64, bfloat16 or float16.
        fc1_weight: (R, C), R hidden channels.
        fc1_bias: (R,) or None.
        fc2_weight: (C, R).
        fc2_bias: (C,) or None.
        scale: (C,) or None, a folded BatchNorm.
        shift: (C,) or None.
        branch_scale: (B,) or None, one factor per image (stochastic depth).
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside a lower-precision x.

    Returns:
        (B, C, H, W) in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
        BackendUnavailable: if a named backend cannot run.

    Source: DS-Net (arXiv 2105.14734), the MLP that ends every DS-Block.
    """
    checks.dims("x", x, "BCHW")
    checks.floating("x", x)
    batch, channels = x.shape[:2]
    checks.dims("fc1_weight", fc1_weight, "OI")
    hidden = fc1_weight.shape[0]
    checks.shape("fc1_weight", fc1_weight, (hidden, channels))
    checks.optional_shape("fc1_bias", fc1_bias, (hidden,))
    checks.shape("fc2_weight", fc2_weight, (channels, hidden))
    checks.optional_shape("fc2_bias", fc2_bias, (channels,))
    checks.optional_shape("scale", scale, (channels,))
    checks.optional_shape("shift", shift, (channels,))
    checks.optional_shape("branch_scale", branch_scale, (batch,))
    x = checks.autocast(x)
    checks.parameters(
        "x",
        x,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        scale=scale,
        shift=shift,
        branch_scale=branch_scale,
    )
    select(OPERATION, backend, x)
    return reference(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        scale=scale,
        shift=shift,
        branch_scale=branch_scale,
    )
