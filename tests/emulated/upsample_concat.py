"""The raw operators of ``upsample_concat`` in the emulator."""

from typing import Any

import emulator_build
import torch
from torch import Tensor

from .call import Call


def _shape(emulator: Any, local: Tensor, global_: Tensor, weight: Tensor) -> Any:
    batch, local_width, height, width = local.shape
    _, global_width, rows, columns = global_.shape
    extents = (height, width, rows, columns)
    return emulator.Shape(batch, *extents, local_width, global_width, weight.shape[0])


def forward(
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    branch_scale: Tensor | None,
    *,
    seed: int = 0,
    **fields: int,
) -> Tensor:
    """(B, C, H, W); ``seed`` orders the threads, ``fields`` replace those of the launch."""
    batch, _, height, width = local.shape
    channels = weight.shape[0]
    out = local.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    if out.numel() == 0:
        return out
    emulator = emulator_build.load("upsample_concat")
    call = Call(emulator, local.dtype, seed, fields)
    cells = batch * global_.shape[2] * global_.shape[3]
    args = emulator.Forward(
        _shape(emulator, local, global_, weight),
        call.channels_last("local", local),
        call.channels_last("global", global_),
        call.matrix("weight", weight),
        call.parameter("bias", bias),
        0 if residual is None else call.channels_last("residual", residual),
        call.parameter("branch_scale", branch_scale),
        call.output("mixed", cells * channels, torch.float32),
        call.output("out", out.numel(), local.dtype),
    )
    call.run(emulator.forward, args, call.launch(args, call.storage))
    return call.result_channels_last("out", out)


def backward(
    grad: Tensor,
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    branch_scale: Tensor | None,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of streams, weight and bias; keywords as in :func:`forward`."""
    channels, single = weight.shape[0], torch.float32
    if grad.numel() == 0:
        zeros = torch.zeros(weight.shape), torch.zeros(channels)
        return torch.zeros_like(local), torch.zeros_like(global_), *zeros
    emulator = emulator_build.load("upsample_concat")
    call = Call(emulator, local.dtype, seed, fields)
    cells = global_.shape[0] * global_.shape[2] * global_.shape[3]
    args = emulator.Backward(
        _shape(emulator, local, global_, weight),
        call.channels_last("grad", grad),
        call.channels_last("local", local),
        call.channels_last("global", global_),
        call.matrix("weight", weight),
        call.parameter("branch_scale", branch_scale),
        call.output("grad_mixed", cells * channels, single),
        call.output("grad_local", local.numel(), local.dtype),
        call.output("grad_global", global_.numel(), local.dtype),
        call.output("grad_weight", weight.numel(), single),
        call.output("grad_bias", channels, single),
    )
    launch = call.launch(args, call.storage)
    args.partials = call.output("partials", launch.slots * (weight.numel() + channels), single)
    call.run(emulator.backward, args, launch)
    return (
        call.result_channels_last("grad_local", local),
        call.result_channels_last("grad_global", global_),
        call.result("grad_weight", single, tuple(weight.shape)),
        call.result("grad_bias", single, (channels,)),
    )


OPERATORS = {"upsample_concat": forward, "upsample_concat_backward": backward}
"""What stands in for each raw operator of the ``cuda`` backend."""
