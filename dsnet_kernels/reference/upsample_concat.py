"""Reference of ``upsample_concat``."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .common import conv1x1, scaled_residual


def upsample_concat(
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """residual + branch_scale·Conv1×1(concat[local, bilinear(global_)])."""
    streams = [local]
    if global_.shape[1]:
        size = local.shape[2:]
        streams.append(F.interpolate(global_, size=size, mode="bilinear", align_corners=False))
    branch = conv1x1(torch.cat(streams, dim=1), weight, bias)
    return scaled_residual(branch, residual, branch_scale)
