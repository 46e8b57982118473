"""A whole DS-Block in inference on the CPU, with packed parameters.

The steps are those of the operations in this package, one after the other inside a single operator,
on as many images at a time as stay in the cache. Of constants alone: norms are folded into the
parameters, or given as scale and shift.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .co_attention import absorbs
from .packed import PackedCache


class BlockSizes(NamedTuple):
    """Extents of a block, without those of the image.

    Args:
        channels: C.
        local_channels, global_channels: of the streams, Cl + Cg = C.
        dim: of co-attention.
        num_heads: of both attentions.
        hidden: R, of the MLP.
        global_height, global_width: of the global grid.
    """

    channels: int
    local_channels: int
    global_channels: int
    dim: int
    num_heads: int
    hidden: int
    global_height: int
    global_width: int

    def refusal(self) -> str | None:
        """Why the operator does not take a block of these extents, or None."""
        if not self.local_channels or not self.global_channels:
            return "the operator mixes two streams"
        for width in (self.dim, self.global_channels):
            head_dim = width // self.num_heads
            if head_dim % 8 or not 8 <= head_dim <= 128:
                return f"heads have {head_dim} channels; the operator takes multiples of 8 to 128"
        return None


def _fake_pack(x, parameters, sizes):
    # How many values there are is the kernel's own affair.
    count = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((count,), dtype=torch.float32)


def _fake(x, packed, sizes, attention_eps, co_attention_eps, with_streams):
    channels, local, global_, _, _, _, *grid = sizes
    images = x.shape[0] if with_streams else 0

    def empty(batch, channels, height, width):
        strides = (height * width * channels, 1, width * channels, channels)
        return x.new_empty_strided((batch, channels, height, width), strides)

    fine = x.shape[2:]
    return (
        empty(x.shape[0], channels, *fine),
        empty(images, local, *fine),
        empty(images, global_, *grid),
    )


operators.define(
    "ds_block_pack", "(Tensor x, Tensor[] parameters, int[] sizes) -> Tensor", _fake_pack
)
operators.define(
    "ds_block",
    "(Tensor x, Tensor packed, int[] sizes, float attention_eps, float co_attention_eps,"
    " bool with_streams) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def ds_block(
    x: Tensor,
    parameters: Sequence[Tensor],
    sizes: BlockSizes,
    cache: PackedCache,
    *,
    attention_eps: float,
    co_attention_eps: float,
    with_streams: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block of these parameters, its norms folded, and both streams as they enter the fusion.

    Args:
        x: (B, C, H, W) in float32 or bfloat16 on the CPU.
        parameters: weight and bias of the position convolution (C, 1, 3, 3); of the split's local
            (Cl, C) and global rows (Cg, C); of the local convolution (Cl, 1, 3, 3), then its scale
            and shift (Cl,); of the attention's norm (Cg,) and QKV (3·Cg, Cg); of co-attention's
            norm (Cg,), local QKV (3·dim, Cl), global QKV (3·dim, Cg), local output (Cl, dim) and
            global output (Cg, dim), then its scale and shift (Cl,); of the fusion (C, C); and of
            the MLP's layers (R, C) and (C, R). In x's dtype or float32.
        sizes: their extents, and the global grid.
        cache: of what is packed.
        attention_eps, co_attention_eps: of the LayerNorms.
        with_streams: whether to return the streams; otherwise they have no images.

    Returns:
        (B, C, H, W); (B, Cl, H, W); (B, Cg, Hg, Wg); all in channels_last.
    """
    height, width = x.shape[2:]
    pixels, coarse = height * width, sizes.global_height * sizes.global_width
    # All that packing knows of the image.
    layout = (
        x.dtype,
        absorbs(pixels, coarse, sizes.local_channels, sizes.num_heads),
        height == 1,
        width == 1,
    )
    operators_ = torch.ops.dsnet_kernels
    packed = cache.get(
        parameters, layout, lambda: operators_.ds_block_pack(x, list(parameters), sizes)
    )
    return operators_.ds_block(x, packed, sizes, attention_eps, co_attention_eps, with_streams)
