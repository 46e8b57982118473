"""BatchNorm in evaluation as constants, in float64."""

import torch
from torch import Tensor, nn

from ..norm import batch_norm_affine


def constant_affine(norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """(s, t) with norm(x) = s·x + t: s = weight / √(var + eps), t = bias − mean·s, in float64.

    Raises:
        TypeError: if ``norm``, called ``name``, is no BatchNorm.
        ValueError: if it has no running statistics.
    """
    if getattr(norm, "running_mean", 0) is None:
        raise ValueError(
            f"model: expected running statistics to fold, got none in {name},"
            " which normalises by each batch's own"
        )
    try:
        return batch_norm_affine(norm.eval(), torch.empty(0, dtype=torch.float64))
    except TypeError as error:
        raise TypeError(f"model: cannot fold {name}: {error}") from None


def fold_into_linear(
    norm: nn.Module, name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W' = W·diag(s), rounded to ``dtype``, and b' with W'·x + b' = W·norm(x) + b.

    b' = b + W·t + (W·diag(s) − W')·mean, in float64: its last term takes the rounding of W' back
    where x is at the running mean.

    Args:
        norm: BN(x) = s·x + t, called ``name``.
        weight: (out, in), or (out, in, 1, 1) of a convolution, whose shape W' has.
        bias: (out,) or None for 0.
        dtype: of W'.

    Raises:
        TypeError, ValueError: as :func:`constant_affine`.
    """
    scale, shift = constant_affine(norm, name)
    matrix = weight.flatten(1).double()
    folded = (matrix * scale).to(dtype)
    moved = matrix @ shift + (matrix * scale - folded.double()) @ norm.running_mean.double()
    return folded.view_as(weight), moved if bias is None else bias.double() + moved


class Constants(nn.Module):
    """Parameters that want no gradient, under the given names, which ``names`` lists."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def tensors(self) -> list[nn.Parameter]:
        """The parameters in the order of their names."""
        # By name: torch.compile of older releases traces no unpacking of a module.
        return [getattr(self, name) for name in self.names]


class ChannelAffine(Constants):
    """scale·x + shift per channel of (B, C, H, W)."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__(scale=scale, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addcmul(self.shift.view(-1, 1, 1), x, self.scale.view(-1, 1, 1))
        return z.to(x.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of constants that operations take beside activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
