"""The ``cuda`` backend without a GPU: its kernels run in the emulator, on CPU tensors.

One module per operation; its ``OPERATORS`` maps each raw operator to a function that takes the
operator's arguments and a ``seed`` of the order of threads.
"""

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsnet_kernels.backends import OPERATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refusal(x: Tensor, *others: Tensor, **options: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the emulator takes it on the CPU"
    return None if x.dtype in DTYPES else f"x is {x.dtype}; the kernel computes in {DTYPES}"


def _kernel(function: Callable[..., Any], seeds: Iterator[int], *args: Any) -> Any:
    return function(*args, seed=next(seeds))


@contextmanager
def stand_in(name: str) -> Iterator[None]:
    """In the block the operation's ``cuda`` backend is present and takes tensors on the CPU.

    The public function, its selection, autograd and raw operators with schemas, fakes and vmap
    rules are the real ones; only the operators' kernels for the CPU are replaced, so the ``cpu``
    backend must not be used meanwhile. Every call has another order of threads.
    """
    operation, module = OPERATIONS[name], importlib.import_module(f"emulated.{name}")
    seeds = itertools.count()
    library = torch.library.Library("dsnet_kernels", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for operator, function in module.OPERATORS.items():
                kernel = partial(_kernel, function, seeds)
                library.impl(operator, kernel, "CPU", allow_override=True)
        stack.enter_context(mock.patch.dict(operation.present, cuda=lambda: None))
        stack.enter_context(mock.patch.dict(operation.can_run, cuda=_refusal))
        yield
