"""Reference of ``pointwise_mlp``."""

from torch import Tensor
from torch.nn import functional as F

from .common import affine, conv1x1, scaled_residual


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
) -> Tensor:
    """x + branch_scale·fc2(GELU(fc1(scale·x + shift))), GELU with erf."""
    hidden = F.gelu(conv1x1(affine(x, scale, shift), fc1_weight, fc1_bias))
    return scaled_residual(conv1x1(hidden, fc2_weight, fc2_bias), x, branch_scale)
