"""What each step of a call launches, multiplies and moves, counted as the dispatcher sees it.

MACs of PyTorch's operators are those of ``torch.utils.flop_counter``, convolutions and matrix
products alone, those of ours by :data:`PRODUCTS`. Published MACs are the paper's equations, as
``dsnet.macs`` counts them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dsnet_kernels.co_attention import absorbs

from ..cases import Stage
from .steps import FORWARD, OTHER, Step, Watch

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Count:
    """Launches, multiply-accumulates and bytes of a step."""

    launches: int = 0
    macs: int = 0
    bytes: int = 0


class Counts(Watch, TorchDispatchMode):
    """Counts by (step, phase) while it is entered as a context.

    A launch is an operator call that writes: views and allocations are none, and an operator of
    ``dsnet_kernels`` is one. Bytes are those of the tensors that it reads and writes, each once per
    call, as if no cache kept any.
    """

    def __init__(self) -> None:
        Watch.__init__(self)
        TorchDispatchMode.__init__(self)
        self.counts: dict[tuple[Step, str], Count] = defaultdict(Count)
        self._pending: list[Count] = []

    def open(self) -> None:
        self._pending.clear()

    def close(self, step: Step, phase: str) -> None:
        total = self.counts[step, phase]
        for each in self._pending:
            total.launches += each.launches
            total.macs += each.macs
            total.bytes += each.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {_identity(value) for value in _tensors((args, kwargs))}
        storages = {storage for storage, *_ in read}
        written = {_identity(value) for value in _tensors(out)}
        new = any(storage not in storages for storage, *_ in written)
        if func.overloadpacket.__name__ not in ALLOCATIONS and (new or func._schema.is_mutable):
            moved = sum(size for *_, size in read | written)
            self._pending.append(Count(1, _macs(func, args, kwargs, out), moved))
        return out


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _identity(value: Tensor) -> tuple:
    """What tells a tensor from others, and its bytes; an expanded dimension has one element."""
    elements = 1
    for length, stride in zip(value.shape, value.stride(), strict=True):
        elements *= 1 if stride == 0 and length else length
    place = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
    return *place, elements * value.element_size()


def _macs(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> int:
    if func.namespace == "dsnet_kernels":
        name = func.overloadpacket.__name__
        base = name.removesuffix("_backward")
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
        forward = PRODUCTS[base.removesuffix("_triton")](arguments)
        return forward if base == name else 2 * forward
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        # Torch's own formula takes the gradient of a depthwise weight for that of a dense one.
        grad, _, weight = args[:3]
        return sum(args[-1][:2]) * grad.numel() * weight[0].numel()
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out) // 2


def _depthwise(a: Mapping[str, Any]) -> int:
    return 9 * a["x"].numel()


def _global_attention(a: Mapping[str, Any]) -> int:
    batch, tokens, width = a["x"].shape
    return batch * (3 * tokens * width**2 + 2 * tokens**2 * width)


def _co_attention(a: Mapping[str, Any]) -> int:
    (batch, local, local_width), (_, coarse, global_width) = a["local"].shape, a["global_"].shape
    heads, dim = a["num_heads"], a["local_proj_weight"].shape[1]
    absorbed = a["absorbed"]
    if absorbed is None:
        absorbed = absorbs(local, coarse, local_width, heads)
    macs = 4 * coarse * global_width * dim
    if absorbed:
        # Local tokens are queries, keys and values of each head; its projections are folded into
        # matrices of the global tokens, four in all.
        macs += 4 * heads * local * coarse * local_width + 4 * coarse * dim * local_width
    else:
        macs += 4 * local * coarse * dim + 4 * local * local_width * dim
    return batch * macs


def _upsample_concat(a: Mapping[str, Any]) -> int:
    return (a["local"].numel() + a["global_"].numel()) * a["weight"].shape[0]


def _pointwise_mlp(a: Mapping[str, Any]) -> int:
    return 2 * a["x"].numel() * a["fc1_weight"].shape[0]


PRODUCTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "depthwise_conv3x3": _depthwise,
    "global_attention": _global_attention,
    "co_attention": _co_attention,
    "upsample_concat": _upsample_concat,
    "pointwise_mlp": _pointwise_mlp,
}
"""MACs of a forward, from its arguments by name. A backward has two products for each of the
forward's; what it computes again is not counted."""


def published_macs(
    model: nn.Module, reference: Mapping[tuple[Step, str], Count], stages: list[Stage]
) -> dict[Step, int]:
    """MACs of a forward by the paper's equations.

    They split at full resolution, the block runs the global half on its coarse grid alone.

    Args:
        model: the network in training or evaluation; in training two products in the backward count
            for each of the forward.
        reference: counted on the reference, which is what the equations say otherwise.
        stages: of the network, with the batch.
    """
    published = {}
    for (step, phase), count in reference.items():
        if phase != FORWARD:
            continue
        macs = count.macs
        if step.operation == "split":
            s = stages[step.stage - 1]
            pixels, coarse = s.grid[0] * s.grid[1], s.global_grid[0] * s.global_grid[1]
            macs += s.batch * (pixels - coarse) * s.channels * s.global_channels
        published[step] = macs * (3 if model.training else 1)
    return published


MARKER = "dsnet profile step "


class Launches(Watch):
    """Kernels that a GPU runs, by (step, phase); within a ``torch.profiler`` of CPU and CUDA.

    The end of each step leaves a range in the profile; a kernel belongs to the first that begins
    after it was launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: list[tuple[Step, str]] = []

    def open(self) -> None:
        """The end of the last step is the beginning of this one."""

    def close(self, step: Step, phase: str) -> None:
        with torch.profiler.record_function(f"{MARKER}{len(self._keys)}"):
            self._keys.append((step, phase))

    def counts(self, events: Iterable[Any]) -> dict[tuple[Step, str], int]:
        """Kernels by step, from the profiler's ``kineto_results.events()``.

        Raises:
            RuntimeError: if the profile holds no kernel.
        """
        on_device, launched, ends = [], {}, {}
        for event in events:
            name = event.name()
            if name.startswith(MARKER):
                ends[int(name.removeprefix(MARKER))] = event.start_ns()
            elif event.device_type() == torch.autograd.DeviceType.CUDA:
                if not name.startswith(("Memcpy", "Memset")):
                    on_device.append(event.correlation_id())
            elif name.startswith(("cuda", "cu", "hip")):
                launched[event.correlation_id()] = event.start_ns()
        if not on_device:
            raise RuntimeError("profile: expected kernels of the GPU, found none")
        marks = sorted((start, index) for index, start in ends.items())
        counts: dict[tuple[Step, str], int] = defaultdict(int)
        for correlation in on_device:
            start = launched.get(correlation)
            later = (index for when, index in marks if start is not None and when >= start)
            index = next(later, None)
            counts[(OTHER, FORWARD) if index is None else self._keys[index]] += 1
        return dict(counts)
