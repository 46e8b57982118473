"""Both sides of a profile: built alike, checked, watched, counted, timed in turn."""

import contextlib
import statistics
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsnet.optimize import optimize

from .. import models, networks
from ..cases import stages
from ..check import Check
from ..device import Device
from ..timing import Timing, compare, measure
from .counts import Counts, Launches, published_macs
from .products import Count
from .report import Part, Side
from .steps import BACKWARD, BLOCK_STEPS, FORWARD, FUSED, HEAD, OTHER, Step, Watch, followed
from .times import DeviceClock, HostClock, Times

BUDGET = {"inference": 9.0, "training": 34.0}
"""Seconds of timing: both sides, with and without instrumentation."""

ROUNDS = (6, 200)
"""The fewest give a 95 % interval of a median."""

Key = tuple[Step, str]


def profile(
    name: str,
    *,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    training: bool,
    device: str = "cpu",
    budget: float | None = None,
    rounds: tuple[int, int] = ROUNDS,
) -> dict[str, Any]:
    """Profiles inference of ``name``, or forward, loss and backward, before and after.

    Before is eager PyTorch in ``channels_last`` on the reference, after ``dsnet.optimize`` or in
    training the network on its kernels; weights and images are the same, and after is checked
    against float64 as ``dsnet bench`` does. Images arrive in NCHW; their conversion is part of the
    time, and of ``other``.

    A part's share is the median over all watched calls of its seconds, over the sum of these
    medians; its seconds are this share of the median call without instrumentation. So parts are
    never negative and add up to the whole. All four take turns, round after round.

    Returns:
        The fields of a :class:`Profile` but for the environment.
    """
    problem = networks.Problem.random(
        name, batch=batch, size=size, dtype=dtype, training=training, device=Device(name=device)
    )
    images, labels = problem.images, problem.labels
    reference, ours = problem.network("reference"), problem.network("auto")
    if not training:
        ours = optimize(ours)
    compared = {"before": reference, "after": ours}
    check = _check(compared, problem)
    call = partial(run, images=images, labels=labels if training else None)
    counts = {side: count(model, call, device) for side, model in compared.items()}
    published = published_macs(reference, counts["before"], stages(name, batch, size))
    whole = any(step.operation == OTHER.operation and step.block for step, _ in counts["after"])
    fused = {step.operation for (step, _), each in counts["after"].items() if each.ours}
    fused = (fused | FUSED.keys() | set(BLOCK_STEPS if whole else ())) - {OTHER.operation}
    watches = {side: Times(_clock(device)) for side in compared}
    calls: dict[str, Callable[[], object]] = {}
    for side, model in compared.items():
        calls[side] = partial(call, model)
        calls[f"{side}, watched"] = partial(call, model, watch=watches[side])
    seconds = BUDGET["training" if training else "inference"] if budget is None else budget
    with torch.inference_mode(not training):
        timings = measure(calls, budget=seconds, rounds=rounds, sample=_sample(device))

    whats = {
        "before": "eager PyTorch, channels_last, on the reference",
        "after": "on the kernels" if training else "dsnet.optimize",
    }
    if whole:
        whats["after"] += ", a block as one operator"
    chosen = models.chosen_backends(name, batch, size, dtype, "auto", device)
    backends = {"before": dict.fromkeys(chosen, "reference"), "after": chosen}
    sides = {}
    for side, watch in watches.items():
        watched = timings[f"{side}, watched"]
        # The calls before were for warming up and for finding the repeats.
        taken = watch.calls[-len(watched.seconds) * watched.repeats :]
        sides[side] = Side(
            name=side,
            what=whats[side],
            **_timed(timings[side]),
            watched_seconds=watched.median,
            chosen=backends[side],
            error=check.worst if side == "after" and check.worst < float("inf") else None,
            problem=_problem(check) if side == "after" else None,
            parts=_parts(taken, timings[side].median, counts[side], published, fused),
        )
    ratio = None if not check.passed else compare(timings["before"], timings["after"])
    return {
        "model": name,
        "shape": tuple(images.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "training": training,
        "launch_unit": "kernels" if _on_gpu(device) else "operator calls",
        **sides,
        "ratio": None if ratio is None else ratio.value,
        # With too few rounds there is no interval.
        "ratio_interval": None if ratio is None or not ratio.low else (ratio.low, ratio.high),
    }


def run(
    model: nn.Module, images: Tensor, labels: Tensor | None, watch: Watch | None = None
) -> None:
    """One call: the forward, and with ``labels`` the loss and the backward.

    Without ``watch`` nothing of the profile's machinery is in it.
    """
    if watch is None:
        if labels is not None:
            model.zero_grad()
        logits = model(images.contiguous(memory_format=torch.channels_last))
        if labels is not None:
            networks.loss(logits, labels).backward()
        return
    with followed(watch), _without_graphs(model):
        watch.start()
        if labels is not None:
            model.zero_grad()
        images = images.contiguous(memory_format=torch.channels_last)
        watch.mark(OTHER)
        logits = model(images)
        watch.mark(HEAD, logits)
    if labels is not None:
        loss = networks.loss(logits, labels)
        watch.mark(OTHER, loss)
        loss.backward()
    watch.stop()


def count(model: nn.Module, call: Callable[..., None], device: str) -> dict[Key, Count]:
    """Launches, MACs and bytes of one call; on a GPU launches are the kernels that it ran."""
    counts = Counts()
    with torch.set_grad_enabled(model.training):
        with counts:
            call(model, watch=counts)
        result = dict(counts.counts)
        if _on_gpu(device):
            launches = _kernels(model, call)
            for key in launches.keys() | result.keys():
                result.setdefault(key, Count()).launches = launches.get(key, 0)
    return result


def _kernels(model: nn.Module, call: Callable[..., None]) -> dict[Key, int]:
    watch = Launches()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call(model, watch=watch)
        torch.cuda.synchronize()
    return watch.counts(profiler.profiler.kineto_results.events())


def _check(compared: Mapping[str, nn.Module], problem: networks.Problem) -> Check:
    converted = problem.images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(not problem.training):
        oracle = problem.oracle()
        values = {
            side: networks.values(model, model, converted, problem.labels)
            for side, model in compared.items()
        }
    return networks.judge(values["after"], 2.0, [values["before"]], oracle)


def _problem(check: Check) -> str | None:
    return None if check.passed else f"check failed: {'; '.join(check.failures)}"


def _timed(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median,
        "quartiles": timing.quartiles,
        "rounds": len(timing.seconds),
        "repeats": timing.repeats,
    }


def _parts(
    calls: list[dict[Key, float]],
    seconds: float,
    counts: Mapping[Key, Count],
    published: Mapping[Step, int],
    fused: Container[str],
) -> tuple[Part, ...]:
    """Shares of ``seconds``, of which the parts take them in full."""
    steps = list(dict.fromkeys(step for each in calls for step, _ in each))
    steps += [step for step, _ in counts if step not in steps]
    medians = {
        (step, phase): statistics.median(each.get((step, phase), 0.0) for each in calls)
        for step in dict.fromkeys(steps)
        for phase in (FORWARD, BACKWARD)
    }
    factor = seconds / sum(medians.values())
    return tuple(
        Part(
            **step._asdict(),
            seconds=factor * (medians[step, FORWARD] + medians[step, BACKWARD]),
            backward_seconds=factor * medians[step, BACKWARD],
            bytes=_sum(counts, step, "bytes"),
            macs=_sum(counts, step, "macs"),
            launches=_sum(counts, step, "launches"),
            published_macs=published.get(step, 0),
            fused=step.operation in fused,
        )
        for step in dict.fromkeys(steps)
    )


def _sum(counts: Mapping[Key, Count], step: Step, field: str) -> int:
    found: Iterable[Count] = (counts.get((step, each), Count()) for each in (FORWARD, BACKWARD))
    return sum(getattr(each, field) for each in found)


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _clock(device: str) -> HostClock | DeviceClock:
    return DeviceClock() if _on_gpu(device) else HostClock()


def _sample(device: str) -> Callable[[Callable[[], object], int], float] | None:
    """How a GPU is timed; None for the timer's own way."""
    if not _on_gpu(device):
        return None
    clock = DeviceClock()

    def sample(call: Callable[[], object], repeats: int) -> float:
        first = clock.stamp()
        for _ in range(repeats):
            call()
        second = clock.stamp()
        clock.settle()
        return clock.seconds(first, second) / repeats

    return sample


@contextlib.contextmanager
def _without_graphs(model: nn.Module):
    """A CUDA graph has no steps."""
    graphs = getattr(model, "graphs", None)
    if graphs is None:
        yield
        return
    limit, graphs.limit = graphs.limit, 0
    try:
        yield
    finally:
        graphs.limit = limit
