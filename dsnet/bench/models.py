"""Rows of whole networks: inference, and a training step."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsnet_kernels
from dsnet.model import create_model
from dsnet.optimize import optimize

from . import peers
from .cases import CASES, stages
from .check import Check, both, check_directions, check_errors
from .ops import explain, make_inputs
from .report import Row
from .row import EAGER_BASELINES, Contender, run_row
from .timing import measure

BUDGET = {"inference": 4.5, "training": 17.0}
"""Seconds of timing per row: six rounds at batch 8 on two cores."""


LEARNING_RATE = 1e-4


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
) -> Row:
    """Times inference of ``name``, or its training step: forward, loss, backward, AdamW.

    Ours is in inference what :func:`dsnet.optimize` returns. Images arrive as a loader delivers
    them, in NCHW; their conversion is part of the time. ``extend`` turns the contenders into those
    that are timed.
    """
    work = "training" if training else "inference"
    generator = torch.Generator().manual_seed(0)
    state = _random_state(name, generator)
    images = torch.randn((batch, 3, *size), generator=generator).to(device, dtype)
    labels = torch.randint(1000, (batch,), generator=generator).to(device)

    def build(variant: str, role: str) -> Contender:
        backend = _with_fallback(variant) if role == "ours" else "reference"
        model = create_model(name, device=device, dtype=dtype, backend=backend)
        model.load_state_dict(state)
        chosen = chosen_backends(name, batch, size, dtype, backend, device)
        model.train(training)
        if role == "ours" and not training:
            model = optimize(model, backend=backend)
        return _contender(variant, role, model, images, labels, chosen)

    rounded = {key: _rounded(value, dtype) for key, value in state.items()}
    exact = create_model(name, device=device, dtype=torch.float64, backend="reference")
    exact.train(training)
    # The oracle starts from the weights as the others have them, rounded.
    exact.load_state_dict(rounded)
    eager = [build(variant, "baseline") for variant in EAGER_BASELINES]
    contenders = [entry for entry in eager if entry.name in baselines]
    if "compile" in baselines:
        contenders.append(build("compile", "baseline"))
    named = [peer for peer in peers.PEERS if peer in baselines]
    refusals = {} if training else {peer: peers.refusal(peer, dtype, device) for peer in named}
    onnx = cache(partial(peers.reference_onnx, name, rounded, images.shape))
    contenders += [peers.contender(peer, onnx, images) for peer, why in refusals.items() if not why]
    contenders += [build(backend, "ours") for backend in backends]
    with torch.inference_mode(not training):
        oracle = _values(exact, exact, images.double(), labels)
        references = [contender.values() for contender in eager]
        del exact, eager
        return run_row(
            extend(contenders),
            partial(_judge, references=references, oracle=oracle),
            budget=BUDGET[work] if budget is None else budget,
            timer=timer,
            kind="model",
            subject=name,
            use="image classification",
            work=work,
            stage=0,
            shape=tuple(images.shape),
            dtype=str(dtype).removeprefix("torch."),
            flops=None,
            bytes=None,
            notes=tuple(_notes(backends, named, refusals, training)),
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


def _with_fallback(backend: str) -> str | list[str]:
    """A named kernel backend does what it can, the reference the other operations."""
    return backend if backend in ("auto", "reference") else [backend, "reference"]


def _notes(
    backends: Sequence[str],
    named: Sequence[str],
    refusals: Mapping[str, str | None],
    training: bool,
):
    if not training:
        yield "ours is dsnet.optimize(model) in inference"
    for backend in backends:
        if backend not in ("auto", "reference"):
            yield f"{backend}: operations without a {backend} kernel run as the reference"
    for peer in named:
        if training:
            yield f"{peer} is left out of training"
        elif refusals[peer] is not None:
            yield f"{peer} is left out: {refusals[peer]}"


def _random_state(name: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Initial weights, with norms and statistics that are not those of a fresh network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = create_model(name, backend="reference").state_dict()
    for key, value in state.items():
        if value.dim() == 1 and value.is_floating_point():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value += noise.abs() if key.endswith("running_var") else noise
    return state


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _contender(
    name: str,
    role: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    chosen: dict[str, str],
) -> Contender:
    layout = torch.contiguous_format if name == "eager_nchw" else torch.channels_last
    model = model.to(memory_format=layout)
    function: Callable[[Tensor], Tensor] = model
    if name == "compile":
        torch._dynamo.reset()
        options = None if model.training else {"freezing": True}
        function = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    def infer() -> Tensor:
        return function(images.contiguous(memory_format=layout))

    # Kept, as a reference's are used twice; in the layout of the timed calls, for the compiler.
    converted = images.contiguous(memory_format=layout)
    values = cache(partial(_values, function, model, converted, labels))
    if not model.training:
        return Contender(name, role, infer, values, name == "compile", chosen)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        _loss(infer(), labels).backward()
        optimizer.step()

    return Contender(name, role, step, values, name == "compile", chosen)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(wide), labels)


def _values(
    function: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The logits and, in training, every parameter's gradient; the model is left without any."""
    logits = function(images)
    values = {"logits": logits.detach()}
    if model.training:
        _loss(logits, labels).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                values[f"grad {name}"] = parameter.grad
        model.zero_grad()
    return values


def _judge(
    values: Mapping[str, Tensor],
    slack: float,
    references: Sequence[Mapping[str, Tensor]],
    oracle: Mapping[str, Tensor],
) -> Check:
    """Directions tensor by tensor, errors of the logits and of all gradients together.

    Rounding errors of one small gradient are few and dependent, so that twice the reference's is
    exceeded by chance; those of all parameters together are not.
    """
    directions = check_directions(values, references, oracle)
    if not directions.passed:
        return directions
    pooled = [_pooled(each, oracle) for each in (values, *references, oracle)]
    return both(directions, check_errors(pooled[0], pooled[1:-1], pooled[-1], slack))


def _pooled(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pooled = {"logits": values["logits"]}
    gradients = [values[name].flatten() for name in like if name != "logits"]
    return pooled | ({"all gradients": torch.cat(gradients)} if gradients else {})
