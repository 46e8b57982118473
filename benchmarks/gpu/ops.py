"""Every operation forward and backward at the stages of tiny, call by call and as a graph."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch._functorch.config
from torch import Tensor

from dsnet.bench.cases import CASES, Case, Stage, stages
from dsnet.bench.ops import (
    DRAWS,
    Inputs,
    as_tuple,
    baseline,
    explain,
    judge_of,
    make_inputs,
    ours,
)
from dsnet.bench.report import Row
from dsnet.bench.row import Contender, run_row

from .clock import captured, timer
from .program import Context

MODEL = "dsnet_tiny"
BATCHES = (256, 64)
SIZE = (224, 224)
DRY = {"batches": (2,), "size": (32, 32)}
BUDGET = 0.25
"""Seconds of timing per row."""

BACKENDS = ("cuda", "triton")
GRAPH = ", CUDA graph"


class BackwardInputs(Inputs):
    """For the backward alone: the forward runs once, with the first call."""

    def bind(self, function: Callable[..., Tensor]) -> Callable[[], Sequence[Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in self.tensors.items()}
        wanted = list(leaves.values())
        # The backward runs on its forward's stream, so each stream, a graph's too, has its own.
        forward = cache(lambda stream: function(**leaves, **self.constants))

        def backward() -> Sequence[Tensor]:
            outputs = as_tuple(forward(_stream(self.grads[0])))
            return torch.autograd.grad(outputs, wanted, self.grads, retain_graph=True)

        return backward

    def values(self, call: Callable[[], Sequence[Tensor]]) -> dict[str, Tensor]:
        names = (f"grad {name}" for name in self.tensors)
        return dict(zip(names, call(), strict=True))


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0


def run(context: Context) -> str | None:
    # The backward of a compiled forward is timed many times over one forward.
    torch._functorch.config.donated_buffer = False
    if context.dry_run:
        # Compiling would take longer than all the rest, and be no GPU's compiler.
        torch.compiler.set_stance("force_eager")
    batches, size = (DRY["batches"], DRY["size"]) if context.dry_run else (BATCHES, SIZE)
    timed = timer(context.device)
    context.results["rows"] = rows = []
    failures = []
    for batch in batches:
        for case in CASES:
            for stage in stages(MODEL, batch, size):
                for backward in (False, True):
                    start = time.monotonic()
                    found = op_rows(case, stage, context.device, timed, backward)
                    rows += [dataclasses.asdict(row) for row in found]
                    failures += [_title(row) for row in found if row.failed()]
                    context.write()
                    print(f"{_title(found[0])}: {time.monotonic() - start:.1f} s", flush=True)
    return f"failed: {'; '.join(failures)}" if failures else None


def _title(row: Row) -> str:
    return f"{row.subject} {row.use.split(':')[0]}, stage {row.stage}, {row.shape}, {row.work}"


def op_rows(
    case: Case,
    stage: Stage,
    device: str,
    timed: Callable[..., dict],
    backward: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Row]:
    """Two rows of the same work: launched call by call, and replayed as a graph."""
    draws = (make_inputs(case, stage, dtype, backward, seed) for seed in range(DRAWS))
    draws = [draw.map(lambda value: value.to(device)) for draw in draws]
    if backward:
        draws = [BackwardInputs(draw.tensors, draw.constants, draw.grads) for draw in draws]
    inputs = draws[0]
    leading = inputs.tensors[case.activations[0]]
    contenders = [baseline(name, case, inputs) for name in case.baselines]
    contenders.append(native(case, inputs))
    backends = our_backends(case, device)
    contenders += [ours(name, case, inputs) for name in backends]
    flops, elements = (part(stage)[int(backward)] for part in (case.flops, case.elements))
    with torch.inference_mode(not backward):
        judge = judge_of(case, draws)

        def row(entered: list[Contender], suffix: str) -> Row:
            return run_row(
                entered,
                judge,
                budget=BUDGET,
                roof=partial(torch.empty_like(leading).copy_, leading),
                timer=timed,
                kind="op",
                subject=case.operation,
                use=f"{case.use}: {case.formula}",
                work=("backward" if backward else "forward") + suffix,
                stage=stage.number,
                shape=tuple(leading.shape),
                dtype=str(dtype).removeprefix("torch."),
                flops=flops,
                bytes=elements * dtype.itemsize,
                notes=_notes(case, inputs, backends),
            )

        graphs = [graphed(contender, inputs, device) for contender in contenders]
        return [row(contenders, ""), row(graphs, GRAPH)]


def our_backends(case: Case, device: str) -> Sequence[str]:
    """On a GPU its two, usable or not: the row says what is against one. The CPU stands in."""
    if device == "cuda":
        return BACKENDS
    available = case.available_backends()
    return [next(name for name in ("cpu", "reference") if name in available)]


def native(case: Case, inputs: Inputs) -> Contender:
    """The reference on ATen's own kernels: cuDNN is off, for forward and backward alike."""
    entry = baseline("eager_channels_last", case, inputs)

    def call() -> object:
        with torch.backends.cudnn.flags(enabled=False):
            return entry.call()

    return dataclasses.replace(entry, name="native", call=call, values=lambda: inputs.values(call))


def graphed(contender: Contender, inputs: Inputs, device: str) -> Contender:
    """The same as a CUDA graph, captured with the first call; its values are those of a replay."""
    replay = cache(lambda: captured(contender.call, device))

    def call() -> object:
        return replay()()

    return dataclasses.replace(
        contender, call=call, values=lambda: inputs.values(call), compiles=False
    )


def _notes(case: Case, inputs: Inputs, backends: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        f"{operation}, {name}: {found.refusals[name]}"
        for operation, found in explain(case, inputs, list(backends))
        for name in backends
        if name in found.refusals
    )
