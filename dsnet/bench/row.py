"""From contenders to a row: compute, check, time in turn, compare."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .check import Check
from .device import CPU, Device
from .report import Result, Row
from .timing import Timing, compare, measure

EAGER_BASELINES = ("eager_nchw", "eager_channels_last")
BASELINES = (*EAGER_BASELINES, "compile")
SDPA = "sdpa"
"""Torch's scaled_dot_product_attention, where an operation can be composed with it."""
AMP = "eager_amp"
"""A network with float32 weights under torch.autocast to the row's dtype, in channels_last."""
NATIVE = "native"
"""The reference of an operation on ATen's own kernels, without cuDNN."""
GPU_BASELINES = ("eager_channels_last", AMP, SDPA)
"""Baselines of a network on a GPU; compiling takes longer than all other rows together."""
GRAPH = ", CUDA graph"
"""Ends the name of the work, or of the contender, that is replayed as a CUDA graph."""


@dataclass(frozen=True)
class Contender:
    """One way to do a row's work.

    Args:
        name: as in :class:`Result`.
        role: as in :class:`Result`.
        call: what is timed.
        values: computes the outputs and gradients to check, on the row's inputs.
        compiles: whether the first call compiles.
        chosen: the backend behind each operation.
    """

    name: str
    role: str
    call: Callable[[], object]
    values: Callable[[], Mapping[str, Tensor]]
    compiles: bool = False
    chosen: dict[str, str] = field(default_factory=dict)


OUT_OF_TIME = "not timed: the time of its row was over"

Judge = Callable[[Mapping[str, Tensor], float], Check]
"""The check of a contender's values with so much slack, as :func:`.check.check_errors` has it."""

SLACK = {"ours": 2.0, "baseline": 16.0}
"""A baseline that rounds more than the reference still counts: leaving it out would flatter us."""


def run_row(
    contenders: list[Contender],
    judge: Judge,
    *,
    budget: float,
    roof: Callable[[], object] | None = None,
    timer: Callable[..., dict] = measure,
    memory: bool = False,
    device: Device = CPU,
    until: float = math.inf,
    **facts: Any,
) -> Row:
    """Checks every contender, times those that passed in turn, and compares with the best baseline.

    Args:
        contenders: baselines and ours.
        judge: checks them.
        budget: seconds of timing.
        roof: a copy of the same data, timed with the others.
        timer: :func:`.timing.measure`, or that with other settings.
        memory: whether each contender's peak memory is measured too, in a call of its own.
        device: counts launches and measures memory.
        until: the time of :func:`time.perf_counter` at which the row should end. Later only the
            first baseline and ours are started, and timing ends after the round under way.
        facts: the fields of the row that are known beforehand.
    """
    entered, results = {}, {(each.role, each.name): {} for each in contenders}
    # What takes longest to prepare comes last, where running out of time loses nothing else.
    for contender in _by_importance(contenders):
        key = (contender.role, contender.name)
        spare = contender.role == "baseline" and any(role == "baseline" for role, _ in entered)
        if spare and time.perf_counter() >= until:
            results[key] = {"problem": OUT_OF_TIME}
            continue
        results[key] = _enter(contender, judge)
        if results[key]["problem"] is None:
            entered[key] = contender.call
            if device.gpu and (contender.role == "ours" or facts.get("kind") == "model"):
                results[key]["launches"] = device.count_launches(contender.call)
            if memory:
                results[key]["peak_bytes"] = device.peak_memory(contender.call)
    if roof is not None:
        entered["roof", "copy"] = roof
        results["roof", "copy"] = {}
    limits = {} if until == math.inf else {"until": until}
    timings = timer(entered, budget=budget, **limits)

    baselines = [key for key in timings if key[0] == "baseline"]
    best = min(baselines, key=lambda key: timings[key].median, default=None)
    for key, timing in timings.items():
        results[key] |= _timed(timing)
        if key[0] == "ours" and best is not None:
            ratio = compare(timings[best], timing)
            results[key] |= {"ratio": ratio.value}
            # With too few rounds there is no interval.
            if ratio.low > 0:
                results[key] |= {"ratio_interval": (ratio.low, ratio.high)}
    return Row(
        **facts,
        best=best[1] if best else None,
        shortened=time.perf_counter() >= until,
        results=tuple(Result(name, role, **fields) for (role, name), fields in results.items()),
    )


def _by_importance(contenders: list[Contender]) -> list[Contender]:
    """The baseline that is prepared fastest, ours, further baselines, and last what compiles."""
    baselines = [each for each in contenders if each.role == "baseline" and not each.compiles]
    others = [each for each in contenders if each.role != "baseline" and not each.compiles]
    compiled = [each for each in contenders if each.compiles]
    # channels_last is by far the faster of the eager ones in most rows.
    baselines.sort(key=lambda each: each.name != "eager_channels_last")
    return [*baselines[:1], *others, *baselines[1:], *compiled]


def _enter(contender: Contender, judge: Judge) -> dict[str, Any]:
    fields: dict[str, Any] = {"chosen": contender.chosen}
    start = time.perf_counter()
    try:
        check = judge(contender.values(), SLACK[contender.role])
    except Exception as error:
        # A contender that cannot run is a result; the others are measured all the same.
        reason = str(error).strip().split("\n")[0]
        return fields | {"problem": f"{type(error).__name__}: {reason}"}
    if contender.compiles:
        fields["compile_seconds"] = time.perf_counter() - start
    fields["error"] = check.worst if check.worst < float("inf") else None
    fields["problem"] = None if check.passed else f"check failed: {'; '.join(check.failures)}"
    return fields


def _timed(timing: Timing) -> dict[str, Any]:
    return {
        "median": timing.median,
        "quartiles": timing.quartiles,
        "rounds": len(timing.seconds),
        "repeats": timing.repeats,
    }
