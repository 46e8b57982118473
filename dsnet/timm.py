"""Registers the published networks with timm; ``import dsnet.timm`` is all it takes.

Example::

    import dsnet.timm
    timm.create_model("dsnet_tiny", num_classes=10, drop_path_rate=0.1)
    timm.create_model("dsnet_small", features_only=True, out_indices=(1, 2, 3))
    timm.create_model("dsnet_base", weights="dsnet_base.safetensors")

Keyword arguments are those of :func:`dsnet.create_model`: ``weights`` reads every format that
:func:`dsnet.load_checkpoint` does, while timm's ``checkpoint_path`` wants a state dict under this
model's own names. No pretrained weights are distributed, so ``pretrained=True`` is an error.
"""

from functools import partial
from typing import Any

from torch import nn

from .model import create_model
from .variants import VARIANTS

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError(
        f"dsnet.timm needs timm ({error}): pip install 'dsnet-kernels[timm]'"
    ) from error

_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "min_input_size": (3, 32, 32),
    "pool_size": (7, 7),
    "crop_pct": 224 / 248,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stages.0.embed",
    "classifier": "head",
    "paper_ids": "arXiv:2105.14734",
}

default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, _CFG))


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"pretrained: no pretrained weights of {name} are distributed;"
            " load a checkpoint with weights=FILE"
        )
    return build_model_with_cfg(
        partial(create_model, name),
        name,
        pretrained=False,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def dsnet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS-Net-T: 10.5 M parameters."""
    return _build("dsnet_tiny", pretrained, **kwargs)


@register_model
def dsnet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS-Net-S: 23.0 M parameters."""
    return _build("dsnet_small", pretrained, **kwargs)


@register_model
def dsnet_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS-Net-B: 49.3 M parameters."""
    return _build("dsnet_base", pretrained, **kwargs)
