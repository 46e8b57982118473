"""Runs the Triton backend without a GPU and counts its kernels.

Triton asks a driver object for the GPU, loads kernels with it and launches them with it. The object
here claims a GPU and launches nothing, so that everything between a public call and the launch is
real: selection, allocation, Triton's own ``run``, the choice of a variant and, if wanted, its
compilation. Results have no meaning.

    with counting() as count, dsnet_kernels.backend("triton"), torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16))
    print(len(count.variants), count.launches.total())
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dsnet_kernels
from dsnet_kernels import triton as backend

H100 = GPUTarget("cuda", 90, 32)
MI300 = GPUTarget("hip", "gfx942", 64)

OPERATIONS = (
    "co_attention",
    "depthwise_conv3x3",
    "global_attention",
    "pointwise_mlp",
    "upsample_concat",
)
"""Those that have Triton kernels."""


@dataclass
class Count:
    """What ran: ``launches`` by kernel, and ``variants``, a kernel and what it is compiled for."""

    launches: Counter[str] = field(default_factory=Counter)
    variants: list[tuple[str, str]] = field(default_factory=list)

    @property
    def variants_by_kernel(self) -> Counter[str]:
        return Counter(name for name, _ in self.variants)


class _Utilities:
    """What Triton loads kernels with; an H100 in its shared memory and multiprocessors."""

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class CountingDriver:
    """A GPU of the given target that counts instead of launching."""

    utils = _Utilities()

    def __init__(self, target: GPUTarget, count: Count) -> None:
        self.target = target
        self.count = count

    def get_current_device(self) -> "CountingDriver":
        """Triton caches kernels by device: no other driver has this one."""
        return self

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """A launcher of a compiled kernel."""
        return self.launcher(src.fn.__name__)

    def launcher(self, name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.count.launches[name] += 1

        return launch


class _NotCompiled:
    """What Triton takes for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def launch_metadata(self, *args: Any) -> None:
        return None


@contextlib.contextmanager
def _operators_on_the_cpu() -> Iterator[None]:
    """The Triton backend's operators take tensors on the CPU too."""
    library = torch.library.Library("dsnet_kernels", "IMPL")
    try:
        for operation in OPERATIONS:
            backend.implement(operation, ("CPU",), library)
        devices = (*backend.devices, "cpu")
        with mock.patch.object(backend, "devices", devices):
            yield
    finally:
        library._destroy()


@contextlib.contextmanager
def counting(target: GPUTarget = H100, compiles: bool = False) -> Iterator[Count]:
    """Inside the block the Triton backend runs on CPU tensors, and its kernels are counted.

    Args:
        target: the GPU that kernels are for.
        compiles: whether each variant is compiled, which takes some 0.6 s.
    """
    count = Count()
    fake = CountingDriver(target, count)
    real_compile, kernels = JITFunction._do_compile, {}

    def compile_(self: JITFunction, key: str, *args: Any) -> Any:
        count.variants.append((self.__name__, key))
        kernels[id(self)] = self
        if compiles:
            return real_compile(self, key, *args)
        kernel = _NotCompiled(fake.launcher(self.__name__))
        self.device_caches[fake][0][key] = kernel
        return kernel

    before = driver._active
    driver.set_active(fake)
    backend.forget_refusal()
    try:
        with _operators_on_the_cpu(), mock.patch.object(JITFunction, "_do_compile", compile_):
            yield count
    finally:
        driver.set_active(before)
        backend.forget_refusal()
        for kernel in kernels.values():
            for compiled in kernel.device_caches.pop(fake)[0].values():
                compiled.module = None  # Or it would be unloaded from a GPU that is not there.


def compilations(function: Callable[[], object], target: GPUTarget = H100) -> Counter[str]:
    """The Triton variants that ``function()`` needs in a fresh process, by kernel.

    ``function`` runs once, with CPU tensors on the Triton backend; inputs may be small, for
    neither the batch nor the image's size makes a variant as a rule.
    """
    with counting(target) as count, dsnet_kernels.backend(["triton", "reference"]):
        function()
    return count.variants_by_kernel
