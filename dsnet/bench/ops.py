"""Rows of single operations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dsnet_kernels
from dsnet_kernels import reference

from .cases import Case, Function, Stage
from .check import Check, Values, both, check_directions, check_errors
from .report import Row
from .row import BASELINES, EAGER_BASELINES, SDPA, Contender, Judge, run_row

BUDGET = 0.4
"""Seconds of timing per row."""

DRAWS = 3
"""Random inputs that the reference's errors are taken from."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of an operation by name, and its outputs' gradients, None for the forward alone."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    grads: tuple[Tensor, ...] | None

    def map(self, convert: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same numbers in another layout or dtype."""
        tensors = {name: convert(value) for name, value in self.tensors.items()}
        grads = None if self.grads is None else tuple(map(convert, self.grads))
        return replace(self, tensors=tensors, grads=grads)

    def bind(self, function: Function) -> Callable[[], Sequence[Tensor]]:
        """``function`` on these arguments, ready to be timed; returns outputs and gradients."""
        function = partial(function, **self.constants)
        if self.grads is None:
            call = partial(function, **self.tensors)
            return lambda: as_tuple(call())
        leaves = {name: value.detach().requires_grad_() for name, value in self.tensors.items()}
        wanted, grads = list(leaves.values()), self.grads

        def forward_backward() -> Sequence[Tensor]:
            outputs = as_tuple(function(**leaves))
            return *outputs, *torch.autograd.grad(outputs, wanted, grads)

        return forward_backward

    def values(self, call: Callable[[], Sequence[Tensor]]) -> dict[str, Tensor]:
        """What ``call`` of :meth:`bind` computes, by name."""
        found = [value.detach() for value in call()]
        gradients = [] if self.grads is None else [f"grad {name}" for name in self.tensors]
        outputs = [f"out {i}" for i in range(len(found) - len(gradients))]
        return dict(zip([*outputs, *gradients], found, strict=True))


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def make_inputs(
    case: Case, stage: Stage, dtype: torch.dtype, backward: bool, seed: int = 0
) -> Inputs:
    """Random inputs of ``case`` in ``channels_last``."""
    tensors, constants = case.tensors(stage, dtype, seed), case.constants(stage)
    if not backward:
        return Inputs(tensors, constants, None)
    function = case.function(partial(getattr, reference))
    # For the outputs' shapes alone.
    outputs = function(**{name: t.to("meta") for name, t in tensors.items()}, **constants)
    generator = torch.Generator().manual_seed(seed + 1)
    grads = (torch.randn(out.shape, generator=generator).to(dtype) for out in as_tuple(outputs))
    return Inputs(tensors, constants, tuple(map(_channels_last, grads)))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def reference_values(case: Case, draws: Iterable[Inputs]) -> tuple[list[Values], Values]:
    """The reference eagerly, for :func:`.check.check_errors`, and in float64, on the first draw.

    The largest of its errors is a matter of chance: further values have those of the other draws,
    about the first one's oracle.
    """
    references: list[Values] = []
    oracle: Values = {}
    for inputs in draws:
        exact = baseline("eager_channels_last", case, inputs.map(Tensor.double)).values()
        found = [baseline(name, case, inputs).values() for name in EAGER_BASELINES]
        if oracle:
            found = [{k: oracle[k] + (v.double() - exact[k]) for k, v in f.items()} for f in found]
        references += found
        oracle = oracle or exact
    return references, oracle


def judge_of(case: Case, draws: Sequence[Inputs]) -> Judge:
    """The check of values on the first of ``draws``: errors, and directions."""
    references, oracle = reference_values(case, draws)

    def judge(values: Mapping[str, Tensor], slack: float) -> Check:
        return both(
            check_errors(values, references, oracle, slack),
            check_directions(values, references, oracle),
        )

    return judge


def baseline(name: str, case: Case, inputs: Inputs) -> Contender:
    """The reference, eagerly in either layout or compiled, or a composition with torch's SDPA.

    Raises:
        ValueError: for an unknown name.
    """
    function = case.function(partial(getattr, reference))
    if name == "eager_nchw":
        inputs = inputs.map(Tensor.contiguous)
    elif name == "compile":
        function = _compiled(function, case.activations, inputs)
    elif name == SDPA:
        function = case.function(_with_sdpa)
    elif name != "eager_channels_last":
        raise ValueError(f"baselines: expected {', '.join((*BASELINES, SDPA))}, got {name!r}")
    call = inputs.bind(function)
    return Contender(
        name, "baseline", call, partial(inputs.values, call), compiles=name == "compile"
    )


def ours(backend: str, case: Case, inputs: Inputs) -> Contender:
    """The public operation on ``backend``."""
    call = inputs.bind(case.function(partial(_operation, backend=backend)))
    chosen = {name: found.chosen or "none" for name, found in explain(case, inputs, backend)}
    return Contender(backend, "ours", call, partial(inputs.values, call), chosen=chosen)


def explain(
    case: Case, inputs: Inputs, backend: str | Sequence[str]
) -> list[tuple[str, dsnet_kernels.backends.Explanation]]:
    """Which backend runs each operation of ``case`` on these arguments, and why not the others."""
    return [
        (
            call.operation,
            dsnet_kernels.explain(call.operation, *call.tensors, backend=backend, **call.options),
        )
        for call in case.calls(inputs.tensors, inputs.constants)
    ]


def _operation(name: str, backend: str) -> Function:
    return partial(getattr(dsnet_kernels, name), backend=backend)


def _with_sdpa(name: str) -> Function:
    """The operation on torch's SDPA, or as the reference has it where there is no attention."""
    has_sdpa = SDPA in dsnet_kernels.available_backends(name)
    return _operation(name, SDPA if has_sdpa else "reference")


def op_row(
    case: Case,
    stage: Stage,
    *,
    dtype: torch.dtype,
    backward: bool,
    backends: Sequence[str],
    baselines: Sequence[str] | None = None,
    budget: float | None = None,
    memory: bool = False,
) -> Row:
    """Times ``case`` at ``stage``, the forward alone or forward and backward."""
    draws = [make_inputs(case, stage, dtype, backward, seed) for seed in range(DRAWS)]
    inputs = draws[0]
    leading = inputs.tensors[case.activations[0]]
    flops, moved = case.work(stage, dtype, backward)
    named = [name for name in baselines or case.baselines if name in case.offered]
    contenders = [baseline(name, case, inputs) for name in named or case.baselines]
    contenders += [ours(name, case, inputs) for name in backends]
    with torch.inference_mode(not backward):
        return run_row(
            contenders,
            judge_of(case, draws),
            budget=BUDGET if budget is None else budget,
            roof=partial(torch.empty_like(leading).copy_, leading),
            memory=memory,
            kind="op",
            subject=case.operation,
            use=f"{case.use}: {case.formula}",
            work="forward+backward" if backward else "forward",
            stage=stage.number,
            shape=tuple(leading.shape),
            dtype=str(dtype).removeprefix("torch."),
            flops=flops,
            bytes=moved,
            notes=_notes(case, inputs, backends),
            image=stage.image,
        )


def _notes(case: Case, inputs: Inputs, backends: Sequence[str]) -> tuple[str, ...]:
    if "auto" not in backends:
        return ()
    return tuple(
        f"auto runs {name} as the reference itself"
        f" ({'; '.join(f'{other}: {reason}' for other, reason in found.refusals.items())})"
        for name, found in explain(case, inputs, "auto")
        if found.chosen == "reference"
    )


class _Frozen(nn.Module):
    """An operation that owns its parameters, so that a compiler may fold them."""

    def __init__(self, function: Function, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, activations: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        return self.function(**activations, **dict(self.named_parameters()))


def _compiled(function: Function, activations: Sequence[str], inputs: Inputs) -> Function:
    # Every row compiles the same code objects: without this, Dynamo's recompilation limit ends it.
    torch._dynamo.reset()
    if inputs.grads is not None:
        return torch.compile(function, fullgraph=True, dynamic=False)
    parameters = {k: v for k, v in inputs.tensors.items() if k not in activations}
    compiled = torch.compile(
        _Frozen(partial(function, **inputs.constants), parameters).eval(),
        fullgraph=True,
        dynamic=False,
        options={"freezing": True},
    )
    return lambda **arguments: compiled({name: arguments[name] for name in activations})
