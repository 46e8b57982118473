"""Rows of single operations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dsnet_kernels
from dsnet_kernels import reference

from .cases import Case, Stage
from .check import Check, both, check_directions, check_errors
from .report import Row
from .row import BASELINES, Contender, run_row


def op_row(
    case: Case,
    stage: Stage,
    *,
    dtype: torch.dtype,
    backward: bool,
    backends: Sequence[str],
    baselines: Sequence[str] = BASELINES,
    budget: float = 0.8,
    seed: int = 0,
) -> Row:
    """Times ``case`` at ``stage``, forward alone or forward and backward."""
    tensors = case.tensors(stage, dtype, seed)
    leading = tensors[case.activations[0]]
    work = _Work(case, tensors, backward)
    references = [work.values(_reference(case), tensors), work.values(_reference(case), work.nchw)]
    oracle = work.values(_reference(case), {k: v.double() for k, v in tensors.items()})

    def judge(values: Mapping[str, Tensor]) -> Check:
        return both(
            check_errors(values, references, oracle), check_directions(values, references, oracle)
        )

    contenders = [_baseline(name, case, work) for name in baselines]
    for name in backends:
        explanation = dsnet_kernels.explain(
            case.operation, *_leading_tensors(case, tensors), backend=name
        )
        function = partial(getattr(dsnet_kernels, case.operation), backend=name, **case.constants)
        chosen = {case.operation: explanation.chosen or "none"}
        contenders.append(work.contender(name, "ours", function, tensors, chosen=chosen))
    copy = torch.empty_like(leading)
    flops, moved = case.work(stage, dtype, backward)
    with torch.inference_mode(not backward):
        return run_row(
            contenders,
            judge,
            budget=budget,
            roof=partial(copy.copy_, leading),
            kind="op",
            subject=case.operation,
            use=f"{case.use}: {case.formula}",
            work="forward+backward" if backward else "forward",
            stage=stage.number,
            shape=tuple(leading.shape),
            dtype=str(dtype).removeprefix("torch."),
            flops=flops,
            bytes=moved,
            notes=tuple(_notes(case, tensors, backends)),
        )


def _reference(case: Case) -> Callable[..., Tensor]:
    return partial(getattr(reference, case.operation), **case.constants)


def _leading_tensors(case: Case, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in case.activations]


def _notes(case: Case, tensors: Mapping[str, Tensor], backends: Sequence[str]):
    for name in backends:
        found = dsnet_kernels.explain(
            case.operation, *_leading_tensors(case, tensors), backend=name
        )
        if name == "auto" and found.chosen == "reference":
            reasons = "; ".join(f"{k}: {reason}" for k, reason in found.refusals.items())
            yield f"auto is the reference itself, not a kernel ({reasons})"


class _Bound(nn.Module):
    """An operation with its parameters, as a compiler wants to see it."""

    def __init__(self, function, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            # The tensor itself, so that gradients arrive where the caller asks for them.
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, activations: dict[str, Tensor]) -> Tensor:
        return self.function(**activations, **dict(self.named_parameters()))


class _Work:
    """The inputs of a row and what is done with them."""

    def __init__(self, case: Case, tensors: dict[str, Tensor], backward: bool) -> None:
        self.case = case
        self.tensors = tensors
        self.backward = backward
        self.nchw = {name: value.contiguous() for name, value in tensors.items()}
        with torch.no_grad():
            like = _reference(case)(**tensors)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(like.shape, generator=generator).to(like.dtype)
        self.grads = {
            "nchw": grad,
            "channels_last": grad.contiguous(memory_format=torch.channels_last),
        }

    def _grad(self, tensors: Mapping[str, Tensor], out: Tensor) -> Tensor:
        layout = "nchw" if tensors is self.nchw else "channels_last"
        return self.grads[layout].to(out.dtype)

    def values(self, function, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The output and, with a backward, every gradient."""
        if not self.backward:
            with torch.inference_mode():
                return {"out": function(**tensors)}
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        out = function(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), self._grad(tensors, out))
        named = {f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), **named}

    def contender(
        self,
        name: str,
        role: str,
        function: Callable[..., Tensor],
        tensors: Mapping[str, Tensor],
        **facts: Any,
    ) -> Contender:
        values = partial(self.values, function, tensors)
        if not self.backward:
            return Contender(name, role, partial(function, **tensors), values, **facts)
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        inputs = list(leaves.values())
        grad = self._grad(tensors, inputs[0])

        def call() -> object:
            return torch.autograd.grad(function(**leaves), inputs, grad)

        return Contender(name, role, call, values, **facts)
