"""The ``cuda`` backend without a GPU: its bindings and kernels run in the emulator.

``csrc/bindings/cuda/<op>.cpp`` and the kernels are compiled as they are. What they ask of a GPU is
answered by the emulator, by ``tests/emulator/device.cpp`` (devices and streams) and by
:class:`memory.Memory` (allocations and dense products); tensors live on the CPU.
"""

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import emulator_build
import torch
from torch import Tensor

from dsnet_kernels.backends import OPERATIONS

from .memory import Memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("dsnet_emulated", "DEF")
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def operators(name: str) -> tuple[str, str]:
    """The raw operators of an operation, forward and backward."""
    return name, f"{name}_backward"


@functools.cache
def _emulated(name: str, operator: str) -> Callable[..., Any]:
    """The operator of the same schema whose kernel for CUDA is the emulator's."""
    emulator_build.load(name)
    _, schema = str(getattr(torch.ops.dsnet_kernels, operator).default._schema).split("::", 1)
    _LIBRARY.define(schema)
    return getattr(torch.ops.dsnet_emulated, operator).default


def call(name: str, operator: str, *args: Any, seed: int = 0, **options: Any) -> Any:
    """One call of a raw operator of the operation ``name``.

    Every result must have been written, but for the padding of hidden activations.

    Args:
        args: the operator's.
        seed: of the order of threads.
        options: further arguments of the operator by name; the others replace fields of the launch
            configuration.
    """
    emulator, kernel = emulator_build.load(name), _emulated(name, operator)
    names = [argument.name for argument in kernel._schema.arguments]
    values = dict(zip(names, args, strict=False))
    values |= {key: options.pop(key) for key in list(options) if key in names}
    memory = Memory(emulator, operator)
    values = {
        key: memory.place(key, value) if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
    emulator.set_seed(seed)
    emulator.replace_fields(options)
    try:
        with memory:
            results = kernel.redispatch(_CUDA, **values)
    finally:
        emulator.replace_fields({})
        memory.finish()
    for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
        if operator == "pointwise_mlp" and i == 1:
            x, width = values["x"], values["fc1_weight"].shape[0]
            result = result[: x.numel() // x.shape[1] * width]
        assert not memory.unwritten(result), f"{operator}: some values of result {i} are unwritten"
    return results


def functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """:func:`call` for the forward and the backward operator of an operation."""
    forward, backward = operators(name)
    return functools.partial(call, name, forward), functools.partial(call, name, backward)


def _refusal(x: Tensor, *others: Tensor, **options: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; the emulator takes it on the CPU"
    return None if x.dtype in DTYPES else f"x is {x.dtype}; the kernel computes in {DTYPES}"


def _keeps_nothing(x: Tensor) -> bool:
    return False


def _kernel(name: str, operator: str, seeds: Iterator[int], *args: Any) -> Any:
    return call(name, operator, *args, seed=next(seeds))


@contextmanager
def stand_in(name: str) -> Iterator[None]:
    """In the block the operation's ``cuda`` backend is present and takes tensors on the CPU.

    The public function, its selection, autograd and raw operators with schemas, fakes and vmap
    rules are the real ones; only the operators' kernels for the CPU are replaced, so the ``cpu``
    backend must not be used meanwhile. Every call has another order of threads.
    """
    operation = OPERATIONS[name]
    seeds = itertools.count()
    library = torch.library.Library("dsnet_kernels", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for operator in operators(name):
                kernel = functools.partial(_kernel, name, operator, seeds)
                library.impl(operator, kernel, "CPU", allow_override=True)
        module = importlib.import_module(f"dsnet_kernels.{name}")
        if hasattr(module, "keeps_qkv"):
            # On a GPU the backward projects again; here the tensors' device says otherwise.
            stack.enter_context(mock.patch.object(module, "keeps_qkv", _keeps_nothing))
        stack.enter_context(mock.patch.dict(operation.present, cuda=lambda: None))
        stack.enter_context(mock.patch.dict(operation.can_run, cuda=_refusal))
        yield
