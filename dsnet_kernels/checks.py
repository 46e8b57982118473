"""Argument checks shared by the operations: each error names the argument, expected and got."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dims(name: str, tensor: Tensor, layout: str) -> None:
    """``tensor`` has one dimension per letter of ``layout``, such as ``"BCHW"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(layout):
        expected = f"{len(layout)} dimensions ({', '.join(layout)})"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(tensor.shape)}")


def floating(name: str, tensor: Tensor) -> None:
    """``tensor`` is strided and has one of the floating-point types the operations compute in."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected layout torch.strided, got {tensor.layout}")
    if tensor.dtype not in FLOATING:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: expected one of {expected}, got {tensor.dtype}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """``tensor`` has exactly this shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def optional_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """``tensor`` is None or has exactly this shape."""
    if tensor is not None:
        shape(name, tensor, expected)


def parameters(leader_name: str, leader: Tensor, **others: Tensor | None) -> None:
    """Parameters have the leader's dtype or float32 (mixed precision), and its device."""
    dtype, device = leader.dtype, leader.device
    mixed = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype and tensor.dtype != mixed:
            expected = " or ".join(sorted({str(dtype), str(mixed)}))
            raise TypeError(
                f"{name}: expected {expected} beside {leader_name} of {dtype}, got {tensor.dtype}"
            )
        if tensor.device != device:
            same_device(leader_name, leader, name, tensor)


def same_dtype(leader_name: str, leader: Tensor, name: str, tensor: Tensor) -> None:
    """Activations of one call share their dtype and device."""
    if tensor.dtype != leader.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {leader_name}, {leader.dtype}, got {tensor.dtype}"
        )
    same_device(leader_name, leader, name, tensor)


def same_device(leader_name: str, leader: Tensor, name: str, tensor: Tensor) -> None:
    """``tensor`` lives where ``leader`` does."""
    if tensor.device != leader.device:
        raise ValueError(
            f"{name}: expected the device of {leader_name}, {leader.device}, got {tensor.device}"
        )


def heads(name: str, width: int, num_heads: int) -> None:
    """``width`` channels split into ``num_heads`` equal heads."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {name} = {width}, got {num_heads}")


def head_dim_refusal(head_dim: int) -> str | None:
    """Why kernels do not take heads of so many channels, or None."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"the head dimension is {head_dim}; the kernel takes multiples of 8 up to 128"
    return None


def probability(name: str, value: float) -> None:
    """0 ≤ value < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def seed(name: str, tensor: Tensor | None, leader_name: str, leader: Tensor) -> None:
    """``tensor`` is None or one int64 on the leader's device."""
    if tensor is None:
        return
    shape(name, tensor, ())
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {tensor.dtype}")
    same_device(leader_name, leader, name, tensor)


def with_signature(function: Callable) -> Callable:
    """Stores the signature that ``autograd.Function.apply`` otherwise recomputes at every call."""
    function.__signature__ = inspect.signature(function)
    return function


def differentiates() -> bool:
    """Whether a call goes through autograd: it may record, or a level of forward mode is open.

    Our functions refuse forward mode; the raw operators would drop its tangents in silence.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Aliases repeats under ``torch.compile``, whose autograd functions refuse one tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]


@native.constant_when_traced
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocast(tensor: Tensor) -> Tensor:
    """Under autocast a float32 activation takes the autocast dtype, as a convolution's does."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not _has_autocast(device):
        return tensor
    if torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
