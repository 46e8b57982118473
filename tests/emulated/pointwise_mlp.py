"""The raw operators of ``pointwise_mlp`` in the emulator."""

from typing import Any

import emulator_build
import torch
from torch import Tensor

from dsnet_kernels.pointwise_mlp import hidden_size

from .call import Call


def _shape(emulator: Any, x: Tensor, fc1_weight: Tensor) -> Any:
    batch, channels, height, width = x.shape
    return emulator.Shape(batch, height, width, channels, fc1_weight.shape[0])


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    branch_scale: Tensor | None,
    keep_hidden: bool,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, Tensor]:
    """out and hidden; ``seed`` orders the threads, ``fields`` replace those of the launch."""
    batch, channels, height, columns = x.shape
    tokens, width = batch * height * columns, fc1_weight.shape[0]
    hidden = x.new_full((hidden_size(x, fc1_weight) if keep_hidden else 0,), float("nan"))
    if tokens == 0:
        return x.new_empty((batch, height, columns, channels)).permute(0, 3, 1, 2), hidden
    emulator = emulator_build.load("pointwise_mlp")
    call = Call(emulator, x.dtype, seed, fields)
    args = emulator.Forward(
        _shape(emulator, x, fc1_weight),
        call.channels_last("x", x),
        call.matrix("fc1_weight", fc1_weight),
        call.parameter("fc1_bias", fc1_bias),
        call.matrix("fc2_weight", fc2_weight),
        call.parameter("fc2_bias", fc2_bias),
        call.parameter("scale", scale),
        call.parameter("shift", shift),
        call.parameter("branch_scale", branch_scale),
        call.output("hidden", tokens * width, x.dtype) if keep_hidden else 0,
        call.output("out", x.numel(), x.dtype),
    )
    launch = call.launch(args, call.storage)
    if not launch.fused:
        args.activated = call.output("activated", launch.slab_tokens * width, x.dtype)
        if scale is not None or shift is not None:
            args.normalized = call.output("normalized", launch.slab_tokens * channels, x.dtype)
    call.run(emulator.forward, args, launch)
    if keep_hidden:
        # Its padding stays NaN, which nothing may read.
        hidden[: tokens * width] = call.result("hidden", x.dtype, (tokens * width,))
    return call.result_channels_last("out", x), hidden


def _rows(x: Tensor) -> Tensor:
    return x.detach().permute(0, 2, 3, 1).flatten(0, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS's on a GPU; as in the bindings, autocast leaves what has an ``out`` alone."""
    out = torch.empty(a.shape[0], b.shape[1])
    return torch.mm(a.detach().float(), b.detach().float(), out=out)


def backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    branch_scale: Tensor | None,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, ...]:
    """The gradients of x and of the parameters; keywords as in :func:`forward`.

    The dense products between the kernels are torch's with float32 sums.
    """
    channels, width, single = x.shape[1], fc1_weight.shape[0], torch.float32
    vectors = {
        "grad_fc1_bias": width,
        "grad_fc2_bias": channels,
        "grad_scale": channels,
        "grad_shift": channels,
    }
    grad_fc1, grad_fc2 = torch.zeros(width, channels), torch.zeros(channels, width)
    tokens = x.shape[0] * x.shape[2] * x.shape[3]
    if tokens == 0:
        fc1_bias, *others = (torch.zeros(size) for size in vectors.values())
        return torch.empty_like(x), grad_fc1, fc1_bias, grad_fc2, *others
    emulator = emulator_build.load("pointwise_mlp")
    call = Call(emulator, x.dtype, seed, fields)
    args = emulator.Backward(
        _shape(emulator, x, fc1_weight),
        call.channels_last("grad", grad),
        call.channels_last("x", x),
        0 if hidden is None else call.place("hidden", hidden[: tokens * width]),
        call.matrix("fc1_weight", fc1_weight),
        call.parameter("fc1_bias", fc1_bias),
        call.matrix("fc2_transposed", fc2_weight.t()),
        call.parameter("scale", scale),
        call.parameter("shift", shift),
        call.parameter("branch_scale", branch_scale),
        call.output("grad_x", x.numel(), x.dtype),
        *(call.output(name, size, single) for name, size in vectors.items()),
    )
    launch = call.launch(args, call.storage)
    args.hidden_partials = call.output("hidden_partials", launch.hidden_slots * width, single)
    args.channel_partials = call.output(
        "channel_partials", 3 * launch.channel_slots * channels, single
    )
    if launch.fused:
        weights = channels * width
        args.fc1_partials = call.output("fc1_partials", launch.hidden_slots * weights, single)
        args.fc2_partials = call.output("fc2_partials", launch.hidden_slots * weights, single)
        args.grad_fc1 = call.output("grad_fc1", weights, single)
        args.grad_fc2 = call.output("grad_fc2", weights, single)
        call.run(emulator.backward_fused, args, launch)
        grad_fc1 = call.result("grad_fc1", single, (width, channels))
        grad_fc2 = call.result("grad_fc2", single, (channels, width))
        fc1_bias, *others = (call.result(name, single, (size,)) for name, size in vectors.items())
        return call.result_channels_last("grad_x", x), grad_fc1, fc1_bias, grad_fc2, *others
    shape = _shape(emulator, x, fc1_weight)
    weight = fc1_weight.to(x.dtype)
    emulator.set_seed(seed)
    for i in range(launch.slabs):
        slab = launch.slab(shape, i)
        own = slice(slab.first, slab.first + slab.tokens)
        wide, narrow = (slab.tokens, width), (slab.tokens, channels)
        args.activated = call.output("activated", slab.tokens * width, x.dtype)
        args.grad_hidden = call.output("grad_hidden", slab.tokens * width, x.dtype)
        has_affine = scale is not None or shift is not None
        if has_affine:
            args.normalized = call.output("normalized", slab.tokens * channels, x.dtype)
        if branch_scale is not None:
            args.grad_branch = call.output("grad_branch", slab.tokens * channels, x.dtype)
        emulator.backward_hidden(args, call.storage, launch, slab)

        grad_hidden = call.result("grad_hidden", x.dtype, wide)
        activated = call.result("activated", x.dtype, wide)
        normalized = call.result("normalized", x.dtype, narrow) if has_affine else _rows(x)[own]
        branch = _rows(grad)[own]
        if branch_scale is not None:
            branch = call.result("grad_branch", x.dtype, narrow)
        grad_fc1 += _product(grad_hidden.t(), normalized)
        grad_fc2 += _product(branch.t(), activated)
        grad_normalized = _product(grad_hidden, weight).to(x.dtype)
        args.grad_normalized = call.place("grad_normalized", grad_normalized)
        emulator.backward_tokens(args, call.storage, launch, slab)
    emulator.backward_sums(args, launch)
    fc1_bias, *others = (call.result(name, single, (size,)) for name, size in vectors.items())
    return call.result_channels_last("grad_x", x), grad_fc1, fc1_bias, grad_fc2, *others


OPERATORS = {"pointwise_mlp": forward, "pointwise_mlp_backward": backward}
"""What stands in for each raw operator of the ``cuda`` backend."""
