"""Names, shapes and architecture of a state dict, in the public layout and in ours."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import STAGES
from ..variants import VARIANTS

_BLOCK_NAMES = {
    "pos_embed": "position.conv",
    "norm1": "norm",
    "conv1": "split",
    "norm_conv1": "local_conv.norm",
    "conv": "local_conv.conv",
    "norm_sa1": "attention.norm",
    "channel_up": "attention.qkv",
    "norm_conv2": "co_attention.local_norm",
    "cross_channel_up_conv": "co_attention.local_qkv",
    "fuse_channel_conv": "co_attention.local_proj",
    "norm_sa2": "co_attention.global_norm",
    "cross_channel_up_sa": "co_attention.global_qkv",
    "fuse_channel_sa": "co_attention.global_proj",
    "conv2": "fuse",
    "norm2": "mlp.norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# 1×1 convolutions in the public code, linear layers in ours.
_POINTWISE = ("co_attention.local_qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight")
_PADDLE_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}

_EMBED = re.compile(r"patch_embed([1-4])\.proj\.(weight|bias)")
_BLOCK = re.compile(r"blocks([1-4])\.([0-9]{1,4})\.([a-z0-9_.]+)\.([a-z_]+)")
_OWN_BLOCK = re.compile(r"stages\.([0-3])\.blocks\.([0-9]{1,4})\..+", re.DOTALL)


def is_public(names: Iterable[str]) -> bool:
    """Whether the names are the public implementations', not ours."""
    return any(_EMBED.fullmatch(name) or _BLOCK.fullmatch(name) for name in names)


def from_public(tensors: Mapping[str, Tensor], *, paddle: bool) -> dict[str, Tensor]:
    """Public names and shapes to ours; unknown names stay. Tensors are views.

    Raises:
        ValueError: if two names become one.
    """
    result = {}
    for public, tensor in tensors.items():
        name = _own_name(public, paddle)
        if name in result:
            raise ValueError(f"it holds {name} twice, the second time as {public}")
        # Every matrix of a Paddle file is a linear layer's, stored (in, out).
        if paddle and tensor.dim() == 2:
            tensor = tensor.T
        if name.endswith(_POINTWISE) and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        result[name] = tensor
    return result


def _own_name(name: str, paddle: bool) -> str:
    if paddle:
        module, _, field = name.rpartition(".")
        name = f"{module}.{_PADDLE_STATISTICS.get(field, field)}" if module else name
    if match := _EMBED.fullmatch(name):
        return f"stages.{int(match[1]) - 1}.embed.{match[2]}"
    if (match := _BLOCK.fullmatch(name)) and match[3] in _BLOCK_NAMES:
        stage, block, module, field = match.groups()
        return f"stages.{int(stage) - 1}.blocks.{block}.{_BLOCK_NAMES[module]}.{field}"
    return name


def add_batch_counts(tensors: dict[str, Tensor]) -> None:
    """Zero for each absent ``num_batches_tracked``, which Paddle and old files leave out."""
    for name in list(tensors):
        if name.endswith(".running_mean"):
            count = name.removesuffix("running_mean") + "num_batches_tracked"
            tensors.setdefault(count, torch.zeros((), dtype=torch.int64))


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell of its network; 0 and None where they tell nothing.

    The fields behind the first two are arguments of :func:`dsnet.create_model`.
    """

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...]
    in_chans: int
    num_classes: int
    alpha: float
    alignment: bool
    co_attention_dim: tuple[int, ...] | None
    mlp_ratio: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Architecture":
        """From names in our layout; nothing is assumed of which are there."""

        def size(name: str, dim: int = 0) -> int:
            shape = tensors[name].shape if name in tensors else ()
            return shape[dim] if dim < len(shape) else 0

        blocks = {match.groups() for match in map(_OWN_BLOCK.fullmatch, tensors) if match}
        depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(STAGES))
        dims = tuple(size(f"stages.{i}.embed.weight") for i in range(STAGES))
        first = [f"stages.{i}.blocks.0" for i in range(STAGES) if dims[i]]
        widths = [dim for dim in dims if dim]
        shares = [size(f"{block}.attention.norm.weight") for block in first]
        hidden = [size(f"{block}.mlp.fc1.bias") for block in first]
        common = tuple(size(f"{block}.co_attention.local_proj.weight", 1) for block in first)
        return cls(
            depths=depths,
            embed_dims=dims,
            in_chans=size("stages.0.embed.weight", 1),
            num_classes=size("head.weight"),
            # The widest stage's share is exact, and rounds to the others'.
            alpha=shares[-1] / widths[-1] if widths else 0.0,
            alignment=any(common),
            co_attention_dim=common if any(common) else None,
            mlp_ratio=max((h / dim for h, dim in zip(hidden, widths, strict=True)), default=0.0),
        )

    @property
    def variant(self) -> str | None:
        """The published network with these depths and widths."""
        for name, variant in VARIANTS.items():
            if (variant.depths, variant.embed_dims) == (self.depths, self.embed_dims):
                return name
        return None

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`dsnet.create_model`, beside the name, that build the network."""
        return {k: v for k, v in asdict(self).items() if k not in ("depths", "embed_dims")}

    def differences(self, model: "Architecture") -> str:
        """``alpha 0.25 in the file, 0.5 in the model``, for each argument that differs.

        Empty between networks of different depths, such as a backbone with fewer stages.
        """
        if self.depths != model.depths:
            return ""
        mine, other = self.arguments(), model.arguments()
        return ", ".join(
            f"{name} {value} in the file, {other[name]} in the model"
            for name, value in mine.items()
            if value != other[name] and (name != "num_classes" or model.num_classes)
        )


def per_stage(name: str, values: Any) -> tuple[int, ...]:
    """``values`` as one whole number of at least 1 per stage.

    Raises:
        ValueError: if they are anything else.
    """
    if not isinstance(values, (list, tuple)) or len(values) != STAGES:
        raise ValueError(f"{name}: expected {STAGES} numbers, got {values!r}")
    if any(type(value) is not int or not 1 <= value < 2**31 for value in values):
        raise ValueError(f"{name}: expected whole numbers of at least 1, got {values!r}")
    return tuple(values)
