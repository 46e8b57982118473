"""Tensors as the kernels read them: activations as rows of channels, parameters contiguous."""

from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """(B, H, W, C) of (B, C, H, W), contiguous; in channels_last the same memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def image_of(rows: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last of (B, H, W, C), the same memory."""
    return rows.permute(0, 3, 1, 2)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
