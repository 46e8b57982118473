"""The raw operators of ``co_attention`` in the emulator."""

from typing import Any

import emulator_build
import torch
from torch import Tensor

from dsnet_kernels.co_attention import _kept_sizes, _parameter_shapes

from .call import Call, change

PARAMETERS = (
    "global_norm_weight",
    "global_norm_bias",
    "local_qkv_weight",
    "local_qkv_bias",
    "global_qkv_weight",
    "global_qkv_bias",
    "local_proj_weight",
    "local_proj_bias",
    "global_proj_weight",
    "global_proj_bias",
    "local_scale",
    "local_shift",
)


def _form(absorbed: bool | None) -> int:
    return -1 if absorbed is None else int(absorbed)


def _inputs(call: Call, local: Tensor, global_: Tensor, *others: Any) -> Any:
    """What forward and backward read, as the bindings prepare it."""
    *parameters, eps, dropout_p, dropout_seed = others
    return call.emulator.Inputs(
        call.place("local", local.detach().contiguous()),
        call.place("global", global_.detach().contiguous()),
        [call.parameter(name, p) for name, p in zip(PARAMETERS, parameters, strict=True)],
        eps,
        dropout_p,
        call.place("seed", dropout_seed) if dropout_p > 0 else 0,
    )


def forward(
    local: Tensor,
    global_: Tensor,
    num_heads: int,
    *others: Any,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, ...]:
    """The streams, what is saved and what is kept: memory alone, which the backward does not read.

    ``others`` are the parameters, eps, dropout_p, seed, absorbed and perhaps keep_qkv.
    ``seed`` orders the threads, ``fields`` replace those of the launch.
    """
    keep_qkv = len(others) > len(PARAMETERS) + 4 and others[-1]
    *others, absorbed = others[: len(PARAMETERS) + 4]
    (batch, tokens, width), global_tokens = local.shape, global_.shape[1]
    dim = others[6].shape[1]
    sizes = (0, 0)
    if keep_qkv:
        sizes = _kept_sizes(local.shape, global_tokens, num_heads, dim, absorbed)
    kept = [torch.zeros(size) for size in sizes]
    shapes = {
        "out_local": tuple(local.shape),
        "out_global": tuple(global_.shape),
        "local_softmax": (batch, num_heads, tokens, 2),
        "global_softmax": (batch, num_heads, global_tokens, 2),
        "attended": (batch, global_tokens, dim),
    }
    dtypes = dict.fromkeys(shapes, torch.float32) | {
        "out_local": local.dtype,
        "out_global": local.dtype,
    }
    if batch == 0:
        empty = (torch.empty(shapes[name], dtype=dtypes[name]) for name in shapes)
        return *empty, *kept
    emulator = emulator_build.load("co_attention")
    call = Call(emulator, local.dtype)
    results = [call.output(n, torch.Size(shapes[n]).numel(), dtypes[n]) for n in shapes]
    shape = emulator.Shape(
        batch, tokens, global_tokens, width, global_.shape[2], num_heads, dim // num_heads
    )
    args = emulator.Forward(shape, _inputs(call, local, global_, *others), *results)
    launch = change(emulator.launch(args, _form(absorbed)), **fields)
    size = emulator.workspace(args, call.storage, launch)
    args.workspace = call.output("workspace", size, torch.uint8)
    emulator.set_seed(seed)
    emulator.forward(args, call.storage, launch)
    return *(call.result(name, dtypes[name], shapes[name]) for name in shapes), *kept


def backward(
    grad_local: Tensor,
    grad_global: Tensor,
    local: Tensor,
    global_: Tensor,
    local_softmax: Tensor,
    global_softmax: Tensor,
    attended: Tensor,
    local_qkv: Tensor | None,
    global_qkv: Tensor | None,
    num_heads: int,
    *others: Any,
    seed: int = 0,
    **fields: int,
) -> tuple[Tensor, ...]:
    """The gradients of both streams and of the parameters in a row; arguments as in forward."""
    *others, absorbed = others
    (batch, tokens, width), (_, global_tokens, global_width) = local.shape, global_.shape
    dim = attended.shape[2]
    shapes = _parameter_shapes(width, global_width, dim)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    if batch == 0:
        return torch.empty_like(local), torch.empty_like(global_), torch.zeros(count)
    emulator = emulator_build.load("co_attention")
    call = Call(emulator, local.dtype)
    args = emulator.Backward(
        emulator.Shape(
            batch, tokens, global_tokens, width, global_width, num_heads, dim // num_heads
        ),
        _inputs(call, local, global_, *others),
        call.place("grad_local", grad_local.detach().contiguous()),
        call.place("grad_global", grad_global.detach().contiguous()),
        call.place("global_softmax", global_softmax.detach().contiguous()),
        call.place("attended", attended.detach().contiguous()),
        call.output("out_local", local.numel(), local.dtype),
        call.output("out_global", global_.numel(), local.dtype),
        call.output("parameters", count, torch.float32),
    )
    launch = change(emulator.launch(args, _form(absorbed)), **fields)
    size = emulator.workspace(args, call.storage, launch)
    args.workspace = call.output("workspace", size, torch.uint8)
    emulator.set_seed(seed)
    emulator.backward(args, call.storage, launch)
    return (
        call.result("out_local", local.dtype, tuple(local.shape)),
        call.result("out_global", local.dtype, tuple(global_.shape)),
        call.result("parameters", torch.float32, (count,)),
    )


OPERATORS = {"co_attention": forward, "co_attention_backward": backward}
"""What stands in for each raw operator of the ``cuda`` backend."""
