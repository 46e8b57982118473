"""The specification: one plain PyTorch function per operation, on any device, exact in float64.

Every other backend is measured against these functions. They use nothing but torch, take the
same arguments as the public functions of :mod:`dsnet_kernels` (without ``backend``) and are
differentiable to any order, forward and reverse.
"""

from .co_attention import co_attention
from .depthwise_conv3x3 import depthwise_conv3x3
from .global_attention import global_attention
from .pointwise_mlp import pointwise_mlp
from .upsample_concat import upsample_concat

__all__ = [
    "co_attention",
    "depthwise_conv3x3",
    "global_attention",
    "pointwise_mlp",
    "upsample_concat",
]
