"""The raw operators of ``global_attention`` in the emulator."""

from typing import Any

import emulator_build
import torch
from torch import Tensor

from dsnet_kernels.global_attention import qkv_size

from .call import Call


def _inputs(
    call: Call,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Any:
    """What forward and backward read, as the bindings prepare it."""
    return call.emulator.Inputs(
        call.place("x", x.detach().contiguous()),
        call.parameter("norm_weight", norm_weight),
        call.parameter("norm_bias", norm_bias),
        call.matrix("qkv_weight", qkv_weight),
        call.parameter("qkv_bias", qkv_bias),
        eps,
        dropout_p,
        call.place("seed", dropout_seed) if dropout_p > 0 else 0,
    )


def forward(
    x: Tensor,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    keep_qkv: bool = False,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and what is kept: memory alone, which the backward does not read.

    ``seed`` orders the threads, ``fields`` replace those of the launch.
    """
    batch, tokens, width = x.shape
    kept = qkv_size(batch, tokens, num_heads, width // num_heads) if keep_qkv else 0
    sums = (batch, num_heads, tokens)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty(sums), torch.zeros(kept)
    emulator = emulator_build.load("global_attention")
    call = Call(emulator, x.dtype, seed, fields)
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, dropout_seed)
    args = emulator.Forward(
        emulator.Shape(batch, tokens, width, num_heads),
        _inputs(call, x, *parameters),
        call.output("out", x.numel(), x.dtype),
        call.output("lse", batch * num_heads * tokens, torch.float32),
        call.output("qkv", 3 * x.numel(), x.dtype),
    )
    call.run(emulator.forward, args, call.launch(args))
    lse = call.result("lse", torch.float32, sums)
    return call.result("out", x.dtype, tuple(x.shape)), lse, torch.zeros(kept)


def backward(
    grad: Tensor,
    x: Tensor,
    lse: Tensor,
    qkv: Tensor | None,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, ...]:
    """The gradients of x and of the parameters; keywords as in :func:`forward`.

    The two dense products between the kernels, cuBLAS's on a GPU, are torch's with float32 sums.
    """
    batch, tokens, width = x.shape
    shapes = {
        "grad_norm_weight": (width,),
        "grad_norm_bias": (width,),
        "grad_qkv_bias": (3 * width,),
    }
    if x.numel() == 0:
        zeros = [torch.zeros(size) for size in (width, width, (3 * width, width), 3 * width)]
        return torch.empty_like(x), *zeros
    emulator = emulator_build.load("global_attention")
    call = Call(emulator, x.dtype, seed, fields)
    rows, single = batch * tokens, torch.float32
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, dropout_seed)
    args = emulator.Backward(
        emulator.Shape(batch, tokens, width, num_heads),
        _inputs(call, x, *parameters),
        call.place("grad", grad.detach().contiguous()),
        call.place("lse", lse.detach().contiguous()),
        call.output("qkv", 3 * x.numel(), x.dtype),
        call.output("normalized", x.numel(), x.dtype),
        call.output("statistics", 2 * rows, single),
        call.output("row_sums", 2 * lse.numel(), single),
        call.output("grad_qkv", 3 * x.numel(), x.dtype),
        call.output("grad_x", x.numel(), x.dtype),
        *(call.output(name, torch.Size(shape).numel(), single) for name, shape in shapes.items()),
    )
    launch = call.launch(args)
    args.partials = call.output("partials", launch.slots * 3 * width, single)
    call.run(emulator.backward_scores, args, launch)

    grad_qkv = call.result("grad_qkv", x.dtype, (rows, 3 * width)).float()
    normalized = call.result("normalized", x.dtype, (rows, width)).float()
    weight = qkv_weight.detach().to(x.dtype).float()
    # As in the bindings: autocast leaves what has an `out` alone.
    grad_qkv_weight = torch.mm(grad_qkv.t(), normalized, out=torch.empty_like(weight))
    grad_normalized = torch.mm(grad_qkv, weight, out=torch.empty_like(normalized))
    args.grad_normalized = call.place("grad_normalized", grad_normalized.to(x.dtype))
    call.run(emulator.backward_norm, args, launch)
    norm_weight, norm_bias, bias = (call.result(name, single, shapes[name]) for name in shapes)
    return (
        call.result("grad_x", x.dtype, tuple(x.shape)),
        norm_weight,
        norm_bias,
        grad_qkv_weight,
        bias,
    )


OPERATORS = {"global_attention": forward, "global_attention_backward": backward}
"""What stands in for each raw operator of the ``cuda`` backend."""
