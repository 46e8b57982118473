"""Raw operators: schema, fake kernel and batching rule; the kernels are registered elsewhere."""

from collections.abc import Callable, Iterator

import torch

from . import native


def define(name: str, schema: str, fake: Callable, batched: Callable | None = None) -> None:
    """Defines ``dsnet_kernels::<name><schema>``.

    Args:
        name: of the operator.
        schema: arguments and results, such as ``"(Tensor x) -> Tensor"``.
        fake: shapes and dtypes of the results, from the arguments.
        batched: the rule of ``torch.vmap``, from (operator, info, in_dims, arguments); by default
            one call after the other.
    """
    native.LIBRARY.define(name + schema)
    torch.library.register_fake(f"dsnet_kernels::{name}", fake)
    operator = getattr(torch.ops.dsnet_kernels, name)
    rule = one_by_one if batched is None else batched
    torch.library.register_vmap(
        f"dsnet_kernels::{name}", lambda info, in_dims, *args: rule(operator, info, in_dims, args)
    )


def one_by_one(operator: Callable, info, in_dims, args):
    """Calls the operator for each element of the batch and stacks the results."""
    results = [operator(*each) for each in _elements(info, in_dims, args)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _elements(info, in_dims, args) -> Iterator[list]:
    for i in range(info.batch_size):
        # The dimensions of a list of numbers are a list, of None.
        yield [
            a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)
        ]


def accumulator(x: torch.Tensor) -> torch.dtype:
    """In what kernels sum, and return gradients of parameters."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def padded(n: int) -> int:
    """n in whole registers of the CPU's kernels, the widest there are."""
    return -(-n // 16) * 16


def empty_channels_last(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised (B, C, H, W) like x, with channels next to each other."""
    channels, height, width = x.shape[1:]
    strides = (height * width * channels, 1, width * channels, channels)
    return x.new_empty_strided(x.shape, strides)
