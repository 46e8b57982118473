"""Reference of ``depthwise_conv3x3``."""

from torch import Tensor
from torch.nn import functional as F

from .common import affine


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """DW3(scale·x + shift) + bias (+ x), the zero padding after the affine."""
    z = affine(x, scale, shift)
    if bias is not None:
        bias = bias.to(x.dtype)
    out = F.conv2d(z, weight.to(x.dtype), bias, padding=1, groups=x.shape[1])
    return out + x if residual else out
