"""The published networks as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One row of the paper's table of architectures."""

    depths: tuple[int, int, int, int]
    embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    num_heads: tuple[int, int, int, int] = (1, 2, 5, 8)


VARIANTS = {
    "dsnet_tiny": Variant(depths=(2, 2, 4, 1)),
    "dsnet_small": Variant(depths=(3, 4, 8, 3)),
    "dsnet_base": Variant(depths=(3, 4, 28, 3)),
}

PAPER_REDUCTION = (8, 4, 2, 1)
"""Global grid at 1/32 of the image in every stage, as in the paper."""

PUBLIC_REDUCTION = (8, 4, 2, 2)
"""What the public checkpoints were trained with."""


def list_models() -> list[str]:
    """The names that :func:`dsnet.create_model` takes."""
    return list(VARIANTS)
