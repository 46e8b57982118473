"""The raw operators of ``depthwise_conv3x3`` in the emulator."""

import emulator_build
import torch
from torch import Tensor

from .call import Call

GRADIENT_ROWS = 12


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: bool,
    *,
    seed: int = 0,
    **fields: int,
) -> Tensor:
    """(B, C, H, W); ``seed`` orders the threads, ``fields`` replace those of the launch."""
    emulator = emulator_build.load("depthwise_conv3x3")
    call = Call(emulator, x.dtype, seed, fields)
    args = emulator.Forward(
        emulator.Shape(*x.shape),
        call.pixels("x", x),
        call.parameter("weight", weight),
        call.parameter("bias", bias),
        call.parameter("scale", scale),
        call.parameter("shift", shift),
        residual,
        call.output("out", x.numel(), x.dtype),
    )
    call.run(emulator.forward, args, call.launch(args, call.storage))
    return call.result_channels_last("out", x)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: bool,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, Tensor]:
    """grad_x and the rows of parameter gradients; keywords as in :func:`forward`."""
    emulator = emulator_build.load("depthwise_conv3x3")
    call = Call(emulator, x.dtype, seed, fields)
    values = GRADIENT_ROWS * x.shape[1]
    args = emulator.Backward(
        emulator.Shape(*x.shape),
        call.pixels("grad", grad),
        call.pixels("x", x),
        call.parameter("weight", weight),
        call.parameter("scale", scale),
        call.parameter("shift", shift),
        residual,
        call.output("grad_x", x.numel(), x.dtype),
        call.output("rows", values, torch.float32),
    )
    launch = call.launch(args, call.storage)
    args.partials = call.output("partials", launch.slots() * values, torch.float32)
    call.run(emulator.backward, args, launch)
    return (
        call.result_channels_last("grad_x", x),
        call.result("rows", torch.float32, (GRADIENT_ROWS, x.shape[1])),
    )


OPERATORS = {
    "depthwise_conv3x3": forward,
    "depthwise_conv3x3_backward": backward,
}
"""What stands in for each raw operator of the ``cuda`` backend."""
