"""Rows of single operations."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import dsnet_kernels
from dsnet_kernels import reference

from .cases import Case, Function, Stage
from .check import Check, Values, both, check_directions, check_errors
from .device import CPU, Device
from .inputs import BackwardInputs, Inputs, make_inputs
from .report import Row
from .row import BASELINES, EAGER_BASELINES, GRAPH, NATIVE, SDPA, Contender, Judge, run_row

BUDGET = 0.4
"""Seconds of timing per row."""

DRAWS = 3
"""Random inputs that the reference's errors are taken from."""


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
    """The reference, eagerly in either layout or compiled, without cuDNN, or with torch's SDPA.

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
    elif name == NATIVE:
        function = _native(function)
    elif name != "eager_channels_last":
        raise ValueError(f"baselines: expected {', '.join((*BASELINES, SDPA))}, got {name!r}")
    call = inputs.bind(function)
    return Contender(
        name, "baseline", call, partial(inputs.values, call), compiles=name == "compile"
    )


def _native(function: Function) -> Function:
    def without_cudnn(**arguments: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return function(**arguments)

    return without_cudnn


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
    device: Device = CPU,
    graph: bool = False,
    alone: bool = False,
    until: float = math.inf,
) -> Row:
    """Times ``case`` at ``stage``, the forward alone or forward and backward.

    Args:
        case: the operation.
        stage: gives the shapes.
        dtype: of activations and parameters.
        backward: forward and backward, not the forward alone.
        backends: ours.
        baselines: to compare with; the case's own by default.
        budget: seconds of timing.
        memory: whether each contender's peak memory is measured too.
        device: where it runs. On a GPU a few images of the batch are checked.
        graph: every contender as the replay of a CUDA graph.
        alone: the backward without its forward.
        until: the time of :func:`time.perf_counter` at which the row should end.
    """
    inputs, draws = _draws(case, stage, dtype, backward or alone, device)
    if alone:
        inputs, *draws = (BackwardInputs(**vars(each)) for each in (inputs, *draws))
    leading = inputs.tensors[case.activations[0]]
    flops, moved = _work(case, stage, dtype, backward, alone)
    named = [name for name in baselines or case.baselines if name in (*case.offered, NATIVE)]
    contenders = [baseline(name, case, inputs) for name in named or case.baselines]
    contenders += [ours(name, case, inputs) for name in backends]
    if graph:
        contenders = [graphed(each, inputs, device) for each in contenders]
    # The backward of one compiled forward runs many times.
    patches = {"donated_buffer": False} if alone else {}
    with torch.inference_mode(not (backward or alone)), functorch_config.patch(patches):
        return run_row(
            contenders,
            judge_of(case, draws),
            budget=BUDGET if budget is None else budget,
            timer=device.cold_timer,
            device=device,
            until=until,
            roof=partial(torch.empty_like(leading).copy_, leading),
            memory=memory,
            kind="op",
            subject=case.operation,
            use=f"{case.use}: {case.formula}",
            work=_direction(backward, alone) + (GRAPH if graph else ""),
            stage=stage.number,
            shape=tuple(leading.shape),
            dtype=str(dtype).removeprefix("torch."),
            flops=flops,
            bytes=moved,
            notes=_notes(case, inputs, backends),
            image=stage.image,
            judged=None if inputs.judged is None else len(inputs.judged),
        )


def _draws(
    case: Case, stage: Stage, dtype: torch.dtype, backward: bool, device: Device
) -> tuple[Inputs, list[Inputs]]:
    """The timed inputs, and the draws for the check: their checked images and further ones."""
    make = partial(make_inputs, case, dtype=dtype, backward=backward, device=device)
    inputs = make(stage)
    images = stage.batch if inputs.judged is None else len(inputs.judged)
    small = dataclasses.replace(stage, batch=images)
    return inputs, [inputs.sample(), *(make(small, seed=seed) for seed in range(1, DRAWS))]


def _work(
    case: Case, stage: Stage, dtype: torch.dtype, backward: bool, alone: bool
) -> tuple[int, int]:
    if not alone:
        return case.work(stage, dtype, backward)
    return case.flops(stage)[1], case.elements(stage)[1] * dtype.itemsize


def _direction(backward: bool, alone: bool) -> str:
    return "backward" if alone else "forward+backward" if backward else "forward"


def graphed(contender: Contender, inputs: Inputs, device: Device) -> Contender:
    """The contender as a CUDA graph, captured by the first call; its values are a replay's."""
    replay = cache(lambda: device.capture(contender.call))

    def call() -> object:
        return replay()()

    return dataclasses.replace(
        contender, call=call, values=lambda: inputs.values(call), compiles=False
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
    on_cpu = next(iter(inputs.tensors.values())).device.type == "cpu"
    tuned = {} if on_cpu else {"mode": "max-autotune-no-cudagraphs"}
    if inputs.grads is not None:
        return torch.compile(function, fullgraph=True, dynamic=False, **tuned)
    parameters = {k: v for k, v in inputs.tensors.items() if k not in activations}
    compiled = torch.compile(
        _Frozen(partial(function, **inputs.constants), parameters).eval(),
        fullgraph=True,
        dynamic=False,
        **(tuned or {"options": {"freezing": True}}),
    )
    return lambda **arguments: compiled({name: arguments[name] for name in activations})
