"""Rows of whole networks: inference, of a classifier or a backbone, and a training step."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

import dsnet_kernels
from dsnet.optimize import optimize

from . import packages, peers
from .baseline_network import with_torch_norms
from .cases import CASES, stages
from .device import CPU, Device, Timer
from .inputs import Inputs
from .networks import LEARNING_RATE, Outputs, Problem, judge, loss, named, values
from .ops import explain
from .report import Row
from .row import AMP, EAGER_BASELINES, GPU_BASELINES, GRAPH, SDPA, Contender, run_row

BUDGET = {"inference": 4.5, "training": 14.0}
"""Seconds of timing per row: six rounds at batch 8 on two cores."""

GPU_BUDGET = 2.0
"""The same on a GPU."""


def model_row(
    name: str,
    *,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    training: bool,
    backends: Sequence[str],
    baselines: Sequence[str] | None = None,
    budget: float | None = None,
    device: Device = CPU,
    timer: Timer | None = None,
    graphs: bool = False,
    until: float = math.inf,
    features: bool = False,
    memory: bool = False,
    exported: Sequence[str] = (),
) -> Row:
    """Times inference of ``name``, or its training step: forward, loss, backward, AdamW.

    Ours is in inference what :func:`dsnet.optimize` returns. Images arrive as a loader delivers
    them, in NCHW; their conversion is part of the time.

    Args:
        name: a published network.
        batch: images per call. On a GPU inference of a few of them is checked.
        size: of the images, (rows, columns).
        dtype: of images and parameters.
        training: a training step, not inference.
        backends: ours.
        baselines: to compare with; the device's own by default.
        budget: seconds of timing.
        device: where it runs.
        timer: replaces the device's.
        graphs: inference of each contender as the replay of a CUDA graph too.
        until: the time of :func:`time.perf_counter` at which the row should end.
        features: a backbone, which returns its stages' maps.
        memory: whether each contender's peak memory is measured too.
        exported: packages of ours, of :data:`.packages.PACKAGES`, that take part in inference.
    """
    if baselines is None:
        baselines = GPU_BASELINES if device.gpu else EAGER_BASELINES
    if dtype == torch.float32:
        # There is nothing to round to.
        baselines = [each for each in baselines if each != AMP]
    problem = Problem.random(
        name,
        batch=batch,
        size=size,
        dtype=dtype,
        training=training,
        features=features,
        device=device,
    )

    def build(variant: str, role: str) -> Contender:
        backend = _backend(variant, role)
        model = problem.network(backend)
        if role == "baseline":
            model = with_torch_norms(model, sdpa=variant == SDPA)
        chosen = chosen_backends(name, batch, size, dtype, backend, device.name)
        if role == "ours" and not training:
            model = optimize(model, backend=backend)
        return _contender(variant, role, model, problem, chosen)

    eager = [build(variant, "baseline") for variant in EAGER_BASELINES]
    contenders = [entry for entry in eager if entry.name in baselines]
    others = (AMP, SDPA, "compile")
    contenders += [build(each, "baseline") for each in others if each in baselines]
    named = [peer for peer in peers.PEERS if peer in baselines]
    refusals = {} if training else {peer: peers.refusal(peer, dtype, device.name) for peer in named}
    onnx = cache(partial(peers.reference_onnx, problem))
    taking_part = [peer for peer, reason in refusals.items() if reason is None]
    contenders += [peers.contender(peer, onnx, problem.images) for peer in taking_part]
    contenders += [build(backend, "ours") for backend in backends]
    refused = {} if training else {each: packages.refusal(each, dtype) for each in exported}
    if any(reason is None for reason in refused.values()):
        chosen = chosen_backends(name, batch, size, dtype, "auto", device.name)
        taken = [each for each, reason in refused.items() if reason is None]
        contenders += [packages.contender(each, problem, chosen) for each in taken]
    if graphs and not training:
        plain = [each for each in contenders if not each.compiles]
        contenders += [_graphed(each, problem, device) for each in plain]
    if budget is None:
        budget = GPU_BUDGET if device.gpu else BUDGET[problem.work]
    with torch.inference_mode(not training):
        oracle = problem.oracle()
        references = [contender.values() for contender in eager]
        del eager
        return run_row(
            contenders,
            partial(judge, references=references, oracle=oracle),
            budget=budget,
            timer=timer or device.timer,
            memory=memory,
            device=device,
            until=until,
            kind="model",
            subject=name,
            use="backbone" if features else "image classification",
            work=problem.work,
            stage=0,
            shape=tuple(problem.images.shape),
            dtype=str(dtype).removeprefix("torch."),
            flops=None,
            bytes=None,
            notes=tuple(
                _notes(backends, baselines, (*named, *exported), refusals | refused, training)
            ),
            image=tuple(size),
            judged=None if problem.judged is None else len(problem.judged),
        )


def chosen_backends(
    name: str,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    backend: str | Sequence[str],
    device: str = "cpu",
) -> dict[str, str]:
    """What runs each operation of the network: one backend, or several joined by ``/``."""
    chosen: dict[str, list[str]] = {op: [] for op in dsnet_kernels.backends.OPERATIONS}
    for case in CASES:
        for stage in stages(name, batch, size):
            inputs = Inputs(case.empty(stage, dtype, device), case.constants(stage), None)
            for operation, found in explain(case, inputs, backend):
                chosen[operation].append(found.chosen or "none")
    # An operation without a case has no kernel: the tests hold the cases to that.
    return {op: "/".join(dict.fromkeys(names)) or "reference" for op, names in chosen.items()}


def _backend(variant: str, role: str) -> str | list[str]:
    """A named kernel backend, or SDPA, does what it can, the reference the other operations."""
    if variant == SDPA or role == "ours":
        return variant if variant in ("auto", "reference") else [variant, "reference"]
    return "reference"


def _notes(
    backends: Sequence[str],
    baselines: Sequence[str],
    named: Sequence[str],
    refusals: Mapping[str, str | None],
    training: bool,
) -> Iterator[str]:
    if not training:
        yield "ours is dsnet.optimize(model) in inference"
    for backend in backends:
        if backend not in ("auto", "reference"):
            yield f"{backend}: operations without a {backend} kernel run as the reference"
    if AMP in baselines:
        yield "the baseline AMP has float32 weights and torch.autocast, in channels_last"
    if SDPA in baselines:
        yield "the baseline sdpa is the reference with torch's SDPA as its attention"
    for peer in named:
        if training:
            yield f"{peer} is left out of training"
        elif refusals[peer] is not None:
            yield f"{peer} is left out: {refusals[peer]}"


def _contender(
    name: str, role: str, model: nn.Module, problem: Problem, chosen: dict[str, str]
) -> Contender:
    images, labels = problem.images, problem.labels
    layout = torch.contiguous_format if name == "eager_nchw" else torch.channels_last
    model = model.to(memory_format=layout)
    function: Callable[[Tensor], Outputs] = model
    if name == AMP:
        model = model.float()
        function = partial(_autocast, model, images.device.type, images.dtype)
    if name == "compile":
        function = _compiled(model, images.device.type)

    def infer() -> Outputs:
        return function(images.contiguous(memory_format=layout))

    # Kept, as a reference's are used twice; in the layout of the timed calls, for the compiler.
    converted = images.contiguous(memory_format=layout)
    found = cache(lambda: problem.selected(values(function, model, converted, labels)))
    if not model.training:
        return Contender(name, role, infer, found, name == "compile", chosen)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        loss(infer(), labels).backward()
        optimizer.step()

    return Contender(name, role, step, found, name == "compile", chosen)


def _autocast(model: nn.Module, device: str, dtype: torch.dtype, images: Tensor) -> Outputs:
    with torch.autocast(device, dtype):
        return model(images)


def _compiled(model: nn.Module, device: str) -> Callable[[Tensor], Outputs]:
    """By default with freezing on the CPU, and max-autotune on a GPU."""
    torch._dynamo.reset()
    if device == "cpu":
        options = None if model.training else {"freezing": True}
        return torch.compile(model, fullgraph=True, dynamic=False, options=options)
    mode = "max-autotune-no-cudagraphs" if model.training else "max-autotune"
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


def _graphed(contender: Contender, problem: Problem, device: Device) -> Contender:
    """The contender as a CUDA graph, captured by the first call; its values are a replay's."""
    replay = cache(lambda: device.capture(contender.call))

    def call() -> Outputs:
        return replay()()

    return dataclasses.replace(
        contender,
        name=f"{contender.name}{GRAPH}",
        call=call,
        values=lambda: problem.selected(named(call())),
    )
