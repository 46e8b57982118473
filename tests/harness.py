"""The layers of proof, once for every operation.

An operation describes its inputs in an :class:`OpCase`; the tests then compare each backend with
the reference in float64 under an error budget, and bit for bit where arithmetic is exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dsnet_kernels
from dsnet_kernels import native

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """One operation and how to make inputs for it.

    ``make(shape, dtype, generator, exact)`` returns (args, kwargs) with tensors in the layout that
    the operation reads in place; with ``exact`` all values are small integers and powers of two.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., Inputs]
    exact: bool = True
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A backend, and for the CPU the instruction set it runs with."""

    backend: str
    capability: str | None = None

    def __str__(self) -> str:
        return self.backend if self.capability is None else f"{self.backend}-{self.capability}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """In the block every operation runs on this variant or raises."""
        introspection, _ = native.introspection()
        previous = introspection.cpu_capability() if self.capability else None
        if self.capability:
            introspection.set_cpu_capability(self.capability)
        try:
            with dsnet_kernels.backend(self.backend):
                yield
        finally:
            if previous:
                introspection.set_cpu_capability(previous)


def variants(operation: str) -> list[Variant]:
    """Every backend that is usable here for the operation, but the reference."""
    found = []
    for backend in dsnet_kernels.available_backends(operation):
        if backend == "cpu":
            introspection, _ = native.introspection()
            found += [Variant("cpu", name) for name in introspection.cpu_capabilities()]
        elif backend != "reference" and torch.cuda.is_available():
            found.append(Variant(backend))
    return found


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors, by position or keyword."""
    args, kwargs = inputs
    named = {str(i): value for i, value in enumerate(args)} | kwargs
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with ``change`` applied to every tensor."""
    args, kwargs = inputs
    return (
        tuple(change(value) if isinstance(value, Tensor) else value for value in args),
        {k: change(value) if isinstance(value, Tensor) else value for k, value in kwargs.items()},
    )


def evaluate(
    function: Callable[..., Any], inputs: Inputs, grads: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs as ``out0`` …, and with ``grads`` the gradient of every input as ``grad <name>``."""
    inputs = mapped(inputs, lambda t: t.detach().requires_grad_(grads is not None))
    args, kwargs = inputs
    outputs = function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    if grads is not None:
        leaves = tensors_of(inputs)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        results |= {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}
    return results


def output_gradients(
    function: Callable[..., Any], inputs: Inputs, generator: torch.Generator, exact: bool = False
) -> list[Tensor]:
    """Random gradients for the outputs, in their dtypes."""
    args, kwargs = inputs
    with torch.no_grad():
        outputs = function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [random(out.shape, out.dtype, generator, exact) for out in outputs]


def random(shape, dtype: torch.dtype, generator: torch.Generator, exact: bool = False) -> Tensor:
    """Normal values, or integers −2 … 2; rank 4 in channels_last."""
    if exact:
        values = torch.randint(-2, 3, tuple(shape), generator=generator).to(dtype)
    else:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


def assert_within_budget(
    got: dict[str, Tensor],
    same_dtype: dict[str, Tensor],
    oracle: dict[str, Tensor],
    slack: float = 2.0,
) -> None:
    """err(kernel) ≤ 2·err(same-dtype reference) + 2·eps·max|oracle|, for maximum and RMS.

    A gradient must also point where the oracle's does, so that zeros cannot hide in a tolerance.
    In float64 the oracle is the reference itself: there the budget is 1e-11·max|oracle|.
    """
    assert got.keys() == oracle.keys()
    for name, value in got.items():
        exact, reference = oracle[name], same_dtype[name]
        assert value.shape == exact.shape, name
        assert value.dtype == reference.dtype, name
        if value.numel() == 0:
            continue
        error, allowed = (value.double() - exact).abs(), (reference.double() - exact).abs()
        assert torch.isfinite(value).all(), f"{name}: not finite"
        eps = torch.finfo(value.dtype).eps if value.dtype != torch.float64 else 5e-12
        floor = 2 * eps * exact.abs().max()
        for norm, measure in (("max", Tensor.max), ("rms", lambda e: e.square().mean().sqrt())):
            found, bound = measure(error), slack * measure(allowed) + floor
            print(f"{name} {norm}: {found:.3g} of {bound:.3g}")
            assert found <= bound, f"{name}: {norm} error {found:.3g}, budget {bound:.3g}"
        if exact.abs().max() > 0:
            cosine = torch.nn.functional.cosine_similarity(
                value.double().flatten(), exact.flatten(), dim=0
            )
            assert cosine > 0.99, f"{name}: cosine {cosine:.4f} to the oracle"
