"""Products of the operators of ``dsnet_kernels``, from their arguments; of a whole block, by step.

Norms, activations, interpolations and whatever a packing rearranges are none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsnet_kernels import BlockSizes
from dsnet_kernels.co_attention import absorbs

Arguments = Mapping[str, Any]
"""Of an operator, by the names in its schema."""


@dataclass
class Count:
    """Launches, multiply-accumulates and bytes of a step.

    Args:
        launches, macs, bytes: what it takes.
        ours: whether operators of ``dsnet_kernels`` are in it.
    """

    launches: int = 0
    macs: int = 0
    bytes: int = 0
    ours: bool = False

    def add(self, other: "Count") -> None:
        self.launches += other.launches
        self.macs += other.macs
        self.bytes += other.bytes
        self.ours |= other.ours


def _depthwise(a: Arguments) -> int:
    return 9 * a["x"].numel()


def _global_attention(a: Arguments) -> int:
    return _attention_macs(*a["x"].shape)


def _attention_macs(batch: int, tokens: int, width: int) -> int:
    return batch * (3 * tokens * width**2 + 2 * tokens**2 * width)


def _co_attention(a: Arguments) -> int:
    (batch, local, local_width), (_, coarse, global_width) = a["local"].shape, a["global_"].shape
    heads, dim, absorbed = a["num_heads"], a["local_proj_weight"].shape[1], a["absorbed"]
    if absorbed is None:
        absorbed = absorbs(local, coarse, local_width, heads)
    one = _co_attention_macs(local, coarse, local_width, global_width, heads, dim, absorbed)
    return batch * one


def _co_attention_macs(
    local: int,
    coarse: int,
    local_width: int,
    global_width: int,
    heads: int,
    dim: int,
    absorbed: bool,
) -> int:
    """Of one image."""
    macs = 4 * coarse * global_width * dim
    if absorbed:
        # Local tokens are queries, keys and values of each head; its projections are folded into
        # matrices of the global tokens, four in all.
        return macs + 4 * heads * local * coarse * local_width + 4 * coarse * dim * local_width
    return macs + 4 * local * coarse * dim + 4 * local * local_width * dim


def _upsample_concat(a: Arguments) -> int:
    return (a["local"].numel() + a["global_"].numel()) * a["weight"].shape[0]


def _pointwise_mlp(a: Arguments) -> int:
    return 2 * a["x"].numel() * a["fc1_weight"].shape[0]


def _patch_conv(a: Arguments) -> int:
    batch, channels, height, width = a["x"].shape
    patch = a["patch"]
    return batch * (height // patch) * (width // patch) * a["outputs"] * channels * patch**2


def _nothing(a: Arguments) -> int:
    return 0


PRODUCTS: dict[str, Callable[[Arguments], int]] = {
    "depthwise_conv3x3": _depthwise,
    "global_attention": _global_attention,
    "co_attention": _co_attention,
    "upsample_concat": _upsample_concat,
    "pointwise_mlp": _pointwise_mlp,
    "patch_conv": _patch_conv,
    "patch_conv_pack": _nothing,
    "ds_block": lambda a: sum(count.macs for count in block_counts(a).values()),
    "ds_block_pack": _nothing,
}
"""MACs of a forward, from its arguments by name. A backward has two products for each of the
forward's; what it computes again is not counted."""


def block_counts(a: Arguments) -> dict[str, Count]:
    """MACs and bytes of the steps inside of a ``ds_block``, in their order, from its arguments.

    As if each were an operator of its own: bytes are those of what it reads and writes, each once,
    its parameters in x's dtype, softmaxes in float32. None of them is a launch. The split has the
    downsample in it, whose result is never stored.
    """
    x, sizes = a["x"], BlockSizes(*a["sizes"])
    batch, _, height, width = x.shape
    fine, coarse = height * width, sizes.global_height * sizes.global_width
    channels, local, global_, dim, heads, hidden = sizes[:6]
    # Of one image.
    whole, streams = fine * channels, fine * local + coarse * global_
    exchanged = _co_attention_macs(
        fine, coarse, local, global_, heads, dim, absorbs(fine, coarse, local, heads)
    )

    def count(macs: int, activations: int, parameters: int, softmaxes: int = 0) -> Count:
        """From MACs and elements of one image, and elements of the parameters."""
        stored = (batch * activations + parameters) * x.element_size()
        return Count(macs=batch * macs, bytes=stored + 4 * batch * softmaxes, ours=True)

    return {
        "position": count(9 * whole, 2 * whole, 10 * channels),
        "split": count(streams * channels, 2 * whole + streams, channels**2 + channels),
        "local": count(9 * fine * local, 2 * fine * local, 12 * local),
        "global_attention": count(
            _attention_macs(1, coarse, global_),
            2 * coarse * global_,
            3 * global_**2 + 5 * global_,
            heads * coarse,
        ),
        "co_attention": count(
            exchanged,
            2 * streams,
            4 * dim * channels + 6 * dim + 3 * channels,
            2 * heads * (fine + coarse) + coarse * dim,
        ),
        "upsample_concat": count(streams * channels, streams + 2 * whole, channels**2 + channels),
        "pointwise_mlp": count(
            2 * whole * hidden, 2 * whole, 2 * hidden * channels + hidden + channels
        ),
    }
