"""Which step of a network is running, seen from outside: the networks know nothing of it.

A step ends where the function that gives it its name returns: one of ``dsnet_kernels``, or
``conv2d`` and ``interpolate`` of ``torch.nn.functional``. What ran since the step before, such as
the statistics of a norm in front, belongs to it. The functions are replaced while a watched call
runs, and only then. The order of the steps, the same in a DSBlock and in an optimised one, tells
the rest: a depthwise convolution opens a block, an MLP closes it, a convolution between two blocks
is a patch embedding. In the backward, a node of the autograd graph belongs to the step whose
result it was first reached from.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dsnet_kernels

FUSED = {
    "position": "depthwise_conv3x3",
    "local": "depthwise_conv3x3",
    "global_attention": "global_attention",
    "co_attention": "co_attention",
    "upsample_concat": "upsample_concat",
    "pointwise_mlp": "pointwise_mlp",
}
"""Steps of a block that are one operation of ``dsnet_kernels``, and which."""

BLOCK_STEPS = (
    "position",
    "split",
    "local",
    "downsample",
    "global_attention",
    "co_attention",
    "upsample_concat",
    "pointwise_mlp",
)
"""The steps of a block in their order."""

AROUND = ("patch_embedding", "head", "other")
"""The rest of a network; ``other`` is what belongs to no step, such as the loss."""

FORWARD, BACKWARD = "forward", "backward"


class Step(NamedTuple):
    """A step, and where it is: stages and their blocks count from 1, 0 is outside."""

    operation: str
    stage: int = 0
    block: int = 0


HEAD, OTHER = Step("head"), Step("other")


class Watch:
    """Follows one call of a network; subclasses say what is noted at the ends of a step."""

    def __init__(self) -> None:
        self._nodes: set[Any] = set()
        self._current = OTHER

    def open(self) -> None:
        """From here on something runs."""
        raise NotImplementedError

    def close(self, step: Step, phase: str) -> None:
        """What ran since :meth:`open` belongs to ``step``."""
        raise NotImplementedError

    def start(self) -> None:
        """The call begins."""
        self._nodes.clear()
        self._current = OTHER
        self.open()

    def mark(self, step: Step, result: Any = None) -> None:
        """A step of the forward ends with ``result``, whose part of the graph is its own."""
        self.close(step, FORWARD)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._claim(tensor.grad_fn, step)
        self.open()

    def stop(self) -> None:
        """The call is over; in training its last part was the backward."""
        self.close(self._current, BACKWARD if self._nodes else FORWARD)
        self._nodes.clear()

    def _claim(self, node: Any, step: Step) -> None:
        """The nodes in front of ``node`` that no earlier step has enter ``step`` when they run."""
        waiting, enter = [node], functools.partial(self._enter, step)
        while waiting:
            node = waiting.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes.add(node)
            node.register_prehook(enter)
            waiting += [before for before, _ in node.next_functions]

    def _enter(self, step: Step, _gradients: Any) -> None:
        if step != self._current:
            self.close(self._current, BACKWARD)
            self._current = step
            self.open()


class _Order:
    """The step that ends with the next of the functions, from the order of those before."""

    def __init__(self) -> None:
        self.stage = self.block = 0
        self.inside = False
        self.nested = False

    def after(self, function: str) -> Step:
        if function == "conv2d" and not self.inside:
            self.stage, self.block = self.stage + 1, 0
            return Step("patch_embedding", self.stage)
        if function == "depthwise_conv3x3" and not self.inside:
            self.inside, self.block = True, self.block + 1
            return Step("position", self.stage, self.block)
        if function == "pointwise_mlp":
            self.inside = False
        name = {"conv2d": "split", "interpolate": "downsample", "depthwise_conv3x3": "local"}
        return Step(name.get(function, function), self.stage, self.block)


@contextlib.contextmanager
def followed(watch: Watch) -> Iterator[None]:
    """Within it every step of one forward of one network ends with ``watch.mark``.

    The functions are replaced for the whole process: nothing else may run a network meanwhile.
    """
    order = _Order()
    functional = torch.nn.functional
    places = [(dsnet_kernels, name) for name in dict.fromkeys(FUSED.values())]
    places += [(functional, "conv2d"), (functional, "interpolate")]
    originals = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name, function in originals:
            setattr(module, name, _marking(function, name, order, watch))
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _marking(function: Callable, name: str, order: _Order, watch: Watch) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The reference of an operation calls functions that elsewhere end steps of their own.
        if order.nested:
            return function(*args, **kwargs)
        order.nested = True
        try:
            result = function(*args, **kwargs)
        finally:
            order.nested = False
        watch.mark(order.after(name), result)
        return result

    return call
