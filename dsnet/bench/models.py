"""Rows of whole networks: inference, of a classifier or a backbone, and a training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

import dsnet_kernels
from dsnet.optimize import optimize

from . import packages, peers
from .cases import CASES, stages
from .networks import LEARNING_RATE, Outputs, Problem, judge, loss, values
from .ops import explain, make_inputs
from .report import Row
from .row import EAGER_BASELINES, SDPA, Contender, run_row
from .timing import measure

BUDGET = {"inference": 4.5, "training": 14.0}
"""Seconds of timing per row: six rounds at batch 8 on two cores."""


def model_row(
    name: str,
    *,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    training: bool,
    backends: Sequence[str],
    baselines: Sequence[str] = EAGER_BASELINES,
    budget: float | None = None,
    device: str = "cpu",
    timer: Callable[..., dict] = measure,
    extend: Callable[[list[Contender]], list[Contender]] = list,
    features: bool = False,
    memory: bool = False,
    exported: Sequence[str] = (),
) -> Row:
    """Times inference of ``name``, or its training step: forward, loss, backward, AdamW.

    Ours is in inference what :func:`dsnet.optimize` returns. Images arrive as a loader delivers
    them, in NCHW; their conversion is part of the time. ``extend`` turns the contenders into those
    that are timed. With ``features`` the network is a backbone, which returns its stages' maps.
    ``exported`` names packages of ours, of :data:`.packages.PACKAGES`, that take part in inference.
    """
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
        chosen = chosen_backends(name, batch, size, dtype, backend, device)
        if role == "ours" and not training:
            model = optimize(model, backend=backend)
        return _contender(variant, role, model, problem, chosen)

    eager = [build(variant, "baseline") for variant in EAGER_BASELINES]
    contenders = [entry for entry in eager if entry.name in baselines]
    contenders += [build(each, "baseline") for each in (SDPA, "compile") if each in baselines]
    named = [peer for peer in peers.PEERS if peer in baselines]
    refusals = {} if training else {peer: peers.refusal(peer, dtype, device) for peer in named}
    onnx = cache(partial(peers.reference_onnx, problem))
    taking_part = [peer for peer, reason in refusals.items() if reason is None]
    contenders += [peers.contender(peer, onnx, problem.images) for peer in taking_part]
    contenders += [build(backend, "ours") for backend in backends]
    refused = {} if training else {each: packages.refusal(each, dtype) for each in exported}
    if any(reason is None for reason in refused.values()):
        chosen = chosen_backends(name, batch, size, dtype, "auto", device)
        taken = [each for each, reason in refused.items() if reason is None]
        contenders += [packages.contender(each, problem, chosen) for each in taken]
    with torch.inference_mode(not training):
        oracle = problem.oracle()
        references = [contender.values() for contender in eager]
        del eager
        return run_row(
            extend(contenders),
            partial(judge, references=references, oracle=oracle),
            budget=BUDGET[problem.work] if budget is None else budget,
            timer=timer,
            memory=memory,
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
            inputs = make_inputs(case, stage, dtype, backward=False)
            inputs = inputs.map(lambda value: value.to(device))
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
    if name == "compile":
        torch._dynamo.reset()
        options = None if model.training else {"freezing": True}
        function = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    def infer() -> Outputs:
        return function(images.contiguous(memory_format=layout))

    # Kept, as a reference's are used twice; in the layout of the timed calls, for the compiler.
    converted = images.contiguous(memory_format=layout)
    found = cache(partial(values, function, model, converted, labels))
    if not model.training:
        return Contender(name, role, infer, found, name == "compile", chosen)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        loss(infer(), labels).backward()
        optimizer.step()

    return Contender(name, role, step, found, name == "compile", chosen)
