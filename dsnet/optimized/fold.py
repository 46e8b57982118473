"""BatchNorm in evaluation as constants, in float64."""

import copy

import torch
from torch import Tensor, nn

from ..norm import batch_norm_affine


def constant_affine(norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """(s, t) with norm(x) = s·x + t: s = weight / √(var + eps), t = bias − mean·s, in float64.

    Both are on the CPU: Apple's GPUs and some of Intel's have no float64.

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
        return batch_norm_affine(_on_cpu(norm).eval(), torch.empty(0, dtype=torch.float64))
    except TypeError as error:
        raise TypeError(f"model: cannot fold {name}: {error}") from None


def fold_into_linear(
    norm: nn.Module, name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W' = W·diag(s), rounded to ``dtype``, and b' with W'·x + b' = W·norm(x) + b.

    b' = b + W·t + (W·diag(s) − W')·mean, in float64: its last term takes the rounding of W' back
    where x is at the running mean. W' is on the device of W, b' on the CPU.

    Args:
        norm: BN(x) = s·x + t, called ``name``.
        weight: (out, in), or (out, in, 1, 1) of a convolution, whose shape W' has.
        bias: (out,) or None for 0.
        dtype: of W'.

    Raises:
        TypeError, ValueError: as :func:`constant_affine`.
    """
    scale, shift = constant_affine(norm, name)
    matrix = _exact(weight).flatten(1)
    folded = (matrix * scale).to(dtype)
    moved = matrix @ shift + (matrix * scale - folded.double()) @ _exact(norm.running_mean)
    moved = moved if bias is None else _exact(bias) + moved
    return folded.view(weight.shape).to(weight.device), moved


def _on_cpu(norm: nn.Module) -> nn.Module:
    """``norm`` with copies of its tensors there; the norm itself where they are there already."""
    mean = getattr(norm, "running_mean", None)
    if mean is None or mean.device.type == "cpu":
        return norm
    twin = copy.copy(norm)
    for group in ("_parameters", "_buffers"):
        tensors = {
            name: None if tensor is None else tensor.detach().cpu()
            for name, tensor in getattr(norm, group).items()
        }
        setattr(twin, group, tensors)
    return twin


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def rounded(exact: Tensor, dtype: torch.dtype, beside: Tensor) -> Tensor:
    """``exact`` in ``dtype``, on the device of ``beside``."""
    return exact.to(dtype).to(beside.device)


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
