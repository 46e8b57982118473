"""Fused operations of the Dual-stream Network, forward and backward, as torch operators."""

from .backends import BackendUnavailable, available_backends, backend, current_backend, explain
from .co_attention import co_attention
from .depthwise_conv3x3 import depthwise_conv3x3
from .ds_block import BlockSizes, ds_block
from .global_attention import global_attention
from .information import info
from .packed import PackedCache
from .patch_conv import patch_conv
from .pointwise_mlp import pointwise_mlp
from .upsample_concat import upsample_concat
from .version import __version__

__all__ = [
    "BackendUnavailable",
    "BlockSizes",
    "PackedCache",
    "__version__",
    "available_backends",
    "backend",
    "co_attention",
    "current_backend",
    "depthwise_conv3x3",
    "ds_block",
    "explain",
    "global_attention",
    "info",
    "patch_conv",
    "pointwise_mlp",
    "upsample_concat",
]
