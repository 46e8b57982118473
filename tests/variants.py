"""What an operation can be run on here: backends, instruction sets, and stand-ins for a GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import emulated
import interpreter
import pytest
import torch

import dsnet_kernels
from dsnet_kernels import native, triton
from dsnet_kernels.backends import BACKENDS, OPERATIONS
from dsnet_kernels.checks import FLOATING

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {
    "sdpa": FLOATING,
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": GPU_DTYPES,
    "cuda": GPU_DTYPES,
}
"""In what a backend computes."""

ADDED_BY = {
    "avx512_bf16": (
        "global_attention",
        "co_attention",
        "pointwise_mlp",
        "upsample_concat",
    )
}
"""Operations with kernels of their own for an instruction set; the others run the one below's."""


@dataclass(frozen=True)
class Variant:
    """A backend of one operation, on the CPU with an instruction set, and where its tensors live.

    ``stand_in`` names what runs a GPU's kernels without one: ``"emulated"`` or ``"interpreted"``.
    """

    operation: str
    backend: str
    capability: str | None = None
    device: str = "cpu"
    stand_in: str | None = None

    def __str__(self) -> str:
        details = [part for part in (self.capability, self.stand_in) if part]
        return "-".join([self.backend, *details])

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.stand_in == "interpreted":
            # Its bfloat16 is wrong, and refused.
            return (torch.float32, torch.float16)
        return DTYPES[self.backend]

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel of ours behind a raw operator, not a composition of torch's."""
        return self.backend != "sdpa"

    @property
    def is_compiled(self) -> bool:
        """Whether its kernels are compiled, and so fast."""
        return self.is_kernel and self.stand_in is None

    @property
    def half(self) -> torch.dtype:
        """The variant's first dtype of 16 bits."""
        return next(dtype for dtype in self.dtypes if dtype.itemsize == 2)

    @property
    def widest(self) -> torch.dtype:
        """The variant's dtype with the smallest rounding error."""
        return min(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @contextmanager
    def active(self) -> Iterator[None]:
        """In the block every operation runs on this variant or raises."""
        with ExitStack() as stack:
            if self.capability is not None:
                introspection, _ = native.introspection()
                stack.callback(introspection.set_cpu_capability, introspection.cpu_capability())
                introspection.set_cpu_capability(self.capability)
            if self.stand_in == "emulated":
                stack.enter_context(emulated.stand_in(self.operation))
            elif self.stand_in == "interpreted":
                stack.enter_context(interpreter.stand_in())
            stack.enter_context(dsnet_kernels.backend(self.backend))
            yield


def variants(operation: str) -> list[Variant]:
    """Every variant that this process can run, but the reference.

    Under ``TRITON_INTERPRET=1`` that is Triton's alone; the others need no second run.
    """
    known = OPERATIONS[operation]
    present = [name for name in BACKENDS if known.presence(name) is None]
    if triton.INTERPRETED:
        found = [Variant(operation, "triton", stand_in="interpreted")]
        return found if "triton" in present else []
    found = [Variant(operation, "sdpa")] if "sdpa" in present else []
    if "cpu" in present:
        introspection, _ = native.introspection()
        for capability in introspection.cpu_capabilities():
            if operation in ADDED_BY.get(capability, (operation,)):
                found.append(Variant(operation, "cpu", capability))
    if torch.cuda.is_available():
        found += [variant for variant in gpu_variants(operation) if variant.backend in present]
    elif "cuda" in OPERATIONS[operation].present:
        found.append(Variant(operation, "cuda", stand_in="emulated"))
    return found


def gpu_variants(operation: str) -> list[Variant]:
    """The variants that an operation has on a GPU, whether or not there is one."""
    kernels = OPERATIONS[operation].present
    return [
        Variant(operation, name, device="cuda") for name in ("cuda", "triton") if name in kernels
    ]


def gpu_mark(variant: Variant) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.gpu,) if variant.device == "cuda" else ()


def on_variants(
    operation: str, keep: Callable[[Variant], bool] = lambda variant: True
) -> pytest.MarkDecorator:
    """Parametrizes a test of one operation by each ``variant`` to keep."""
    parameters = [
        pytest.param(variant, id=str(variant), marks=gpu_mark(variant))
        for variant in variants(operation)
        if keep(variant)
    ]
    return pytest.mark.parametrize("variant", parameters)


class OnDevice:
    """What a check looks at of a float32 tensor on the device of a backend, there or not."""

    dtype = torch.float32

    def __init__(self, backend: str, shape: tuple[int, ...]) -> None:
        self.device = torch.device("cpu" if backend == "cpu" else "cuda")
        self.shape = shape

    def get_device(self) -> int:
        return 0

    def numel(self) -> int:
        return math.prod(self.shape)
