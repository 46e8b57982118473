"""The raw operators of ``global_attention`` in the emulator."""

from typing import Any

import emulator_build
import torch
from torch import Tensor

from .call import Call, change


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
        call.place("qkv_weight", qkv_weight.detach().to(x.dtype).contiguous()),
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
    *,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, Tensor]:
    """out and lse; ``seed`` orders the threads, ``fields`` replace those of the launch."""
    batch, tokens, width = x.shape
    sums = (batch, num_heads, tokens)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty(sums)
    emulator = emulator_build.load("global_attention")
    call = Call(emulator, x.dtype)
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, eps, dropout_p, dropout_seed)
    args = emulator.Forward(
        emulator.Shape(batch, tokens, width, num_heads),
        _inputs(call, x, *parameters),
        call.output("out", x.numel(), x.dtype),
        call.output("lse", batch * num_heads * tokens, torch.float32),
        call.output("qkv", 3 * x.numel(), x.dtype),
    )
    emulator.set_seed(seed)
    emulator.forward(args, call.storage, change(emulator.launch(args), **fields))
    return call.result("out", x.dtype, tuple(x.shape)), call.result("lse", torch.float32, sums)
