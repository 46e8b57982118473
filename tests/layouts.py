"""Layouts of activations (B, C, H, W) and (B, M, C) that a kernel reads in place or copies.

Every function keeps values, shape, dtype and device; what lies around the values is NaN.
"""

from functools import partial

import torch
from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """No two channels next to each other."""
    if x.dim() == 4:
        return x.contiguous()
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def transposed(x: Tensor) -> Tensor:
    """The two dimensions outside the channels change places in memory."""
    first, second = (2, 3) if x.dim() == 4 else (0, 1)
    return x.transpose(first, second).contiguous().transpose(first, second)


def every_second(x: Tensor) -> Tensor:
    """Columns, or tokens, with one between them that belongs to nobody."""
    dim = 3 if x.dim() == 4 else 1
    spread = x.repeat_interleave(2, dim=dim)
    skip = [slice(None)] * x.dim()
    skip[dim] = slice(1, None, 2)
    spread[tuple(skip)] = float("nan")
    skip[dim] = slice(None, None, 2)
    return spread[tuple(skip)]


def embedded(x: Tensor, before: int, after: int) -> Tensor:
    """Channels [before, before + C) of more, and inside more rows and columns, or tokens."""
    channel = 1 if x.dim() == 4 else 2
    inner = x.movedim(channel, -1)
    batch, *extents, channels = inner.shape
    outer = inner.new_full(
        (batch, *(extent + 2 for extent in extents), before + channels + after), float("nan")
    )
    middle = [slice(1, -1)] * len(extents)
    part = outer[(slice(None), *middle, slice(before, before + channels))]
    return part.copy_(inner).movedim(-1, channel)


def at_offset(x: Tensor, offset: int) -> Tensor:
    """In the layout of x, ``offset`` elements into its storage."""
    memory = x.new_full((x.numel() + offset + 1,), float("nan"))
    return memory.as_strided(x.shape, x.stride(), offset).copy_(x)


def followed_by_nan(x: Tensor) -> Tensor:
    """In the layout of x, before more NaN than a kernel's tile holds."""
    memory = x.new_full((x.numel() + 4096,), float("nan"))
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def apart(x: Tensor, distance: int) -> Tensor:
    """Images ``distance`` elements apart; the memory between them is never touched."""
    memory = torch.empty((x.shape[0] - 1) * distance + x[0].numel(), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, (distance, *x.stride()[1:])).copy_(x)


LAYOUTS = {
    "channels_first": channels_first,
    "transposed": transposed,
    "every_second": every_second,
    "slice_of_even_width": partial(embedded, before=8, after=8),
    "slice_at_1": partial(embedded, before=1, after=3),
    "slice_at_3": partial(embedded, before=3, after=1),
    "slice_at_7": partial(embedded, before=7, after=3),
    **{f"offset_{offset}": partial(at_offset, offset=offset) for offset in range(1, 8)},
}

STAND_IN_LAYOUTS = {
    name: layout
    for name, layout in LAYOUTS.items()
    if name not in ("slice_at_3", "slice_at_7", "offset_3", "offset_5", "offset_6", "offset_7")
}
"""One of each alignment, for what runs a kernel slowly."""
