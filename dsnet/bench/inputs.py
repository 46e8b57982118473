"""Arguments of an operation, drawn on the device of a benchmark."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dsnet_kernels import reference

from .cases import Case, Function, Stage
from .device import CPU, Device


@dataclass(frozen=True)
class Inputs:
    """Arguments of an operation by name, and its outputs' gradients, None for the forward alone.

    Args:
        tensors: activations and parameters.
        constants: the other arguments.
        grads: gradients of the outputs.
        activations: names of the tensors that hold an entry per image.
        judged: indices of the images whose values are checked; None for all.
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    grads: tuple[Tensor, ...] | None
    activations: tuple[str, ...] = ()
    judged: Tensor | None = None

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
        """Outputs and gradients of ``call``, made by :meth:`bind`, of the images that are checked.

        The outputs' gradients of all other images are zero meanwhile, so that the parameters'
        gradients have parts of the checked images alone.
        """
        with self._others_masked():
            found = [value.detach().clone() for value in call()]
        gradients = [] if self.grads is None else [f"grad {name}" for name in self.tensors]
        outputs = [f"out {i}" for i in range(len(found) - len(gradients))]
        return self._selected(dict(zip([*outputs, *gradients], found, strict=True)))

    def sample(self) -> "Inputs":
        """The arguments of the checked images alone."""
        if self.judged is None:
            return self
        tensors = {
            name: self._images(value) if name in self.activations else value
            for name, value in self.tensors.items()
        }
        grads = None if self.grads is None else tuple(map(self._images, self.grads))
        return replace(self, tensors=tensors, grads=grads, judged=None)

    def _selected(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.judged is None:
            return values
        per_image = {f"grad {name}" for name in self.activations}
        return {
            name: self._images(value) if name in per_image or name.startswith("out") else value
            for name, value in values.items()
        }

    def _images(self, x: Tensor) -> Tensor:
        return _channels_last(x[self.judged])

    @contextmanager
    def _others_masked(self) -> Iterator[None]:
        if self.judged is None or self.grads is None:
            yield
            return
        # In place: a CUDA graph reads these very tensors.
        saved = [grad.clone() for grad in self.grads]
        for grad, before in zip(self.grads, saved, strict=True):
            grad.zero_()
            grad[self.judged] = before[self.judged]
        try:
            yield
        finally:
            for grad, before in zip(self.grads, saved, strict=True):
                grad.copy_(before)


class BackwardInputs(Inputs):
    """Arguments of the backward alone: the forward runs once, before the first call."""

    def bind(self, function: Function) -> Callable[[], Sequence[Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in self.tensors.items()}
        wanted = list(leaves.values())
        # The backward runs on its forward's stream, so each stream, a graph's too, has its own.
        forward = cache(lambda stream: as_tuple(function(**leaves, **self.constants)))

        def backward() -> Sequence[Tensor]:
            outputs = forward(_stream(self.grads[0]))
            return torch.autograd.grad(outputs, wanted, self.grads, retain_graph=True)

        return backward


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def make_inputs(
    case: Case,
    stage: Stage,
    dtype: torch.dtype,
    backward: bool,
    seed: int = 0,
    device: Device = CPU,
) -> Inputs:
    """Random inputs of ``case`` in ``channels_last``, drawn on ``device``."""
    tensors, constants = case.tensors(stage, dtype, seed, device.name), case.constants(stage)
    judged = device.judged(stage.batch)
    if not backward:
        return Inputs(tensors, constants, None, case.activations, judged)
    function = case.function(partial(getattr, reference))
    # For the outputs' shapes alone.
    outputs = function(**{name: t.to("meta") for name, t in tensors.items()}, **constants)
    options = {"generator": device.generator(seed + 1), "device": device.name}
    grads = (torch.randn(out.shape, **options).to(dtype) for out in as_tuple(outputs))
    grads = tuple(map(_channels_last, grads))
    return Inputs(tensors, constants, grads, case.activations, judged)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
