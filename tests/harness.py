"""What the layers of proof need of an operation, and how results are compared.

An operation describes itself in an :class:`OpCase`; ``test_operations*.py`` then hold each of its
variants to the reference in float64 under an error budget, and bit for bit where arithmetic is
exact.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from variants import Variant

Inputs = dict[str, Any]
"""Arguments of a public function by name, in the order of its signature."""

Results = dict[str, Tensor]
"""Outputs ``out0`` …, and gradients ``grad <name>``."""

Sample = tuple[Inputs, list[Tensor]]
"""Inputs, and gradients of the outputs."""

Shape = tuple[int, ...]
"""What ``make`` understands by it; the first entry is the batch."""


@dataclass(frozen=True)
class BadArgument:
    """An argument that every backend refuses alike: with ``error``, matching ``message``."""

    change: Inputs
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpCase:
    """One operation: its inputs, and what its layers of proof need to know beyond them.

    Args:
        name: of the operation.
        function, reference: with the same names of arguments.
        make: ``make(shape, dtype, generator, exact=False, **option)`` returns the inputs, the
            activations in the layout that kernels read in place; with ``exact`` all values are
            small integers and powers of two.
        activations: names of the inputs (B, …) that layouts and lower precision apply to.
        shapes: small, for every variant; among them an empty batch.
        native_shapes: larger ones, for compiled kernels only; among them one whose batch times
            rows or heads is above 65,535.
        small: two of different batch and extents, one that suits vectors and an odd one.
        tiny: for finite differences.
        exact_shapes: where small integers give exact results; none if the operation rounds.
        options: further arguments of ``make`` by name, at least two; layers that try but a few take
            the first.
        refused: options that a backend refuses, by backend.
        faults: wrong results by name, from the function and inputs of ``small[0]``.
        bad: arguments to be refused, each a change to the inputs of ``small[0]`` in float32.
        slack: the budget in errors of the reference in the same dtype, where a backend has another
            one than 2.
        redraws: how many more times the reference is evaluated in float32, each time with inputs
            changed by up to half of their last bit. Where few roundings decide, as in a softmax of
            large logits, the error of a single evaluation is a matter of chance.
        cancelling: from inputs and gradients of the outputs, Σ|terms| of gradients whose terms
            cancel: the exact gradient is zero where this is none.
        sums_follow_layout: backends whose parameter gradients are summed in an order that depends
            on the strides and alignment of activations.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Inputs]
    activations: tuple[str, ...]
    shapes: tuple[Shape, ...]
    native_shapes: tuple[Shape, ...]
    small: tuple[Shape, Shape]
    tiny: tuple[Shape, ...]
    exact_shapes: tuple[Shape, ...] = ()
    options: Mapping[str, Inputs] = field(default_factory=lambda: {"full": {}})
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    faults: Mapping[str, Callable[[Callable[..., Any], Inputs], Any]] = field(default_factory=dict)
    bad: Mapping[str, BadArgument] = field(default_factory=dict)
    slack: Mapping[str, float] = field(default_factory=dict)
    redraws: int = 0
    cancelling: Callable[[Inputs, list[Tensor]], Results] = lambda inputs, grads: {}
    sums_follow_layout: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def generator(seed: int) -> torch.Generator:
    """A generator of its own for everything random in a test."""
    return torch.Generator().manual_seed(seed)


def random(shape: Iterable[int], dtype: torch.dtype, generator: torch.Generator, exact=False):
    """Normal values, or integers −2 … 2; rank 4 in channels_last."""
    if exact:
        values = torch.randint(-2, 3, tuple(shape), generator=generator).to(dtype)
    else:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    return values.to(memory_format=torch.channels_last) if values.dim() == 4 else values


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that have a gradient."""
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with ``change`` applied to every tensor that has a gradient."""
    return inputs | {name: change(value) for name, value in tensors_of(inputs).items()}


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def evaluate(
    function: Callable[..., Any], inputs: Inputs, grads: list[Tensor] | None = None
) -> Results:
    """Outputs as ``out0`` …, and with ``grads`` the gradient of every tensor as ``grad <name>``."""
    inputs = mapped(inputs, lambda t: t.detach().requires_grad_(grads is not None))
    outputs = outputs_of(function(**inputs))
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    if grads is not None:
        leaves = tensors_of(inputs)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        results |= {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}
    return results


def placed(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device, its whole storage with it: strides, offset and surroundings stay."""
    if tensor.device.type == device or tensor.device.type == "meta" or tensor.is_mkldnn:
        return tensor
    if tensor.layout != torch.strided:
        return tensor.to(device)
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((count,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def inputs_on(device: str, inputs: Inputs) -> Inputs:
    return {
        name: placed(value, device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def run(
    case: OpCase, variant: Variant, inputs: Inputs, grads: list[Tensor] | None = None
) -> Results:
    """:func:`evaluate` on a variant, which must be active; results on the CPU."""
    if grads is not None:
        grads = [placed(grad, variant.device) for grad in grads]
    results = evaluate(case.function, inputs_on(variant.device, inputs), grads)
    return {name: value.cpu() for name, value in results.items()}


def exact_results(case: OpCase, inputs: Inputs, grads: list[Tensor]) -> Results:
    """The reference in float64."""
    return evaluate(case.reference, mapped(inputs, Tensor.double), [g.double() for g in grads])


def sample(
    case: OpCase,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    exact: bool = False,
    option: Mapping[str, Any] = MappingProxyType({}),
) -> Sample:
    """Random inputs, and gradients of the outputs in their dtypes."""
    inputs = case.make(shape, dtype, generator(seed), exact, **option)
    values = generator(seed + 1000)
    with torch.no_grad():
        outputs = outputs_of(case.reference(**inputs))
    return inputs, [random(out.shape, out.dtype, values, exact) for out in outputs]


def compare(case: OpCase, variant: Variant, *samples: Sample) -> Results:
    """Forward and backward within the budget of all samples together, which have the same shapes.

    A gradient of few values may by chance have next to no error in the reference: several samples
    make its budget a fair one. Returns the variant's results of the last sample.
    """
    oracle = [exact_results(case, *each) for each in samples]
    references = [
        [evaluate(case.reference, *each) for each in drawn] for drawn in _redrawn(case, samples)
    ]
    with variant.active():
        got = [run(case, variant, *each) for each in samples]
    cancelling = [case.cancelling(*each) for each in samples]
    stacked, exact, terms, *same_dtype = [
        {name: torch.stack([each[name] for each in results]) for name in results[0]}
        for results in (got, oracle, cancelling, *references)
    ]
    slack = case.slack.get(variant.backend, 2.0)
    assert_within_budget(stacked, same_dtype, exact, slack, terms)
    return got[-1]


def _redrawn(case: OpCase, samples: tuple[Sample, ...]) -> Iterator[list[Sample]]:
    """The samples, and in float32 those of ``case.redraws``."""
    yield list(samples)
    values = generator(2000)
    for _ in range(case.redraws if samples[0][1][0].dtype == torch.float32 else 0):

        def change(value: Tensor) -> Tensor:
            noise = torch.rand(value.shape, generator=values, dtype=torch.float64) - 0.5
            return (value * (1 + torch.finfo(torch.float32).eps * noise)).to(value.dtype)

        yield [(mapped(inputs, change), grads) for inputs, grads in samples]


def assert_within_budget(
    got: Results,
    same_dtype: Results | Sequence[Results],
    oracle: Results,
    slack: float = 2.0,
    cancelling: Results = MappingProxyType({}),
) -> None:
    """err(kernel) ≤ slack·err(same-dtype reference) + 2·eps·max|oracle|, for maximum and RMS.

    A gradient must also point where the oracle's does, so that zeros cannot hide in a tolerance.
    In float64 the oracle is the reference itself: there the budget is 1e-11·max|oracle|. Among
    several references the largest error counts.

    A gradient that is exactly zero, since its terms cancel, is judged apart: the reference's error
    is then a few roundings that depend on its order of additions. ``cancelling`` has Σ|terms| of
    such gradients, zero where the terms do not cancel, in place of the oracle's size.
    """
    assert got.keys() == oracle.keys()
    several = [same_dtype] if isinstance(same_dtype, Mapping) else same_dtype
    for name, value in got.items():
        exact, references = oracle[name], [each[name] for each in several]
        assert value.shape == exact.shape, name
        assert value.dtype == references[0].dtype, name
        terms = cancelling.get(name)
        if terms is None:
            _assert_part_within_budget(name, value, references, exact, exact, slack)
            continue
        for place, part, sizes in (
            ("", terms == 0, exact),
            (" where terms cancel", terms > 0, terms),
        ):
            chosen = (value[part], [each[part] for each in references], exact[part], sizes[part])
            _assert_part_within_budget(name + place, *chosen, slack, directed=sizes is exact)


def _assert_part_within_budget(
    name: str,
    value: Tensor,
    references: list[Tensor],
    exact: Tensor,
    size: Tensor,
    slack: float,
    directed: bool = True,
) -> None:
    if value.numel() == 0:
        return
    error, *allowed = [(each.double() - exact).abs() for each in (value, *references)]
    assert torch.isfinite(value).all(), f"{name}: not finite"
    eps = torch.finfo(value.dtype).eps if value.dtype != torch.float64 else 5e-12
    floor = 2 * eps * size.abs().max()
    for norm, measure in (("max", Tensor.max), ("rms", lambda e: e.square().mean().sqrt())):
        found, bound = measure(error), slack * max(map(measure, allowed)) + floor
        print(f"{name} {norm}: {found:.3g} of {bound:.3g}")
        assert found <= bound, f"{name}: {norm} error {found:.3g}, budget {bound:.3g}"
    if directed and exact.abs().max() > 0:
        cosine = torch.nn.functional.cosine_similarity(
            value.double().flatten(), exact.flatten(), dim=0
        )
        assert cosine > 0.99, f"{name}: cosine {cosine:.4f} to the oracle"


def assert_same_bits(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
