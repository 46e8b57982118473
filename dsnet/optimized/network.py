"""The modules that :func:`dsnet.optimize` returns."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsnet_kernels import triton

from ..model import DSNet
from .block import INFERENCE_ONLY
from .fold import Constants, fold_into_linear, rounded
from .graphs import GraphCache


class Optimized(nn.Module):
    """A module whose DSBlocks are optimised; called like the one it was made from.

    Attributes and methods that it has not itself are those of ``module``.

    Args:
        module: in evaluation, with :class:`OptimizedBlock` in the place of each DSBlock.
        original: the state dict of the source.
    """

    def __init__(self, module: nn.Module, original: "OrderedDict[str, Any]") -> None:
        super().__init__()
        self.module = module
        self._original = original
        self.eval().requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def original_state_dict(self) -> "OrderedDict[str, Any]":
        """The state dict of the source when it was optimised, on the CPU, bit for bit."""
        return copy.deepcopy(self._original)

    def warm_up(self, shapes: Iterable[Sequence[int]]) -> "Optimized":
        """Prepares each DSNet inside for images of these shapes.

        Args:
            shapes: likewise of :meth:`OptimizedDSNet.warm_up`.

        Returns:
            The module itself.

        Raises:
            ValueError: if there is no DSNet inside, or for shapes that one refuses.
        """
        networks = [each for each in self.modules() if isinstance(each, OptimizedDSNet)]
        if not networks:
            raise ValueError(f"warm_up: expected a DSNet inside, got {type(self.module).__name__}")
        shapes = list(shapes)
        for network in networks:
            network.warm_up(shapes)
        return self

    def train(self, mode: bool = True) -> "Optimized":
        if mode:
            raise RuntimeError(INFERENCE_ONLY)
        return super().train(mode)


def folded_classifier(network: DSNet, dtype: torch.dtype | None) -> Constants | None:
    """Weight and bias of the head behind the pooling without the norm, if there are both."""
    head = network.head
    if type(head) is not nn.Linear or isinstance(network.norm, nn.Identity):
        return None
    dtype = head.weight.dtype if dtype is None else dtype
    weight, bias = fold_into_linear(network.norm, "norm", head.weight, head.bias, dtype)
    return Constants(weight=weight, bias=rounded(bias, dtype, weight))


class OptimizedDSNet(Optimized):
    """A DSNet for inference, its last norm folded into the classifier.

    Head: W·(s·mean(x) + t) + b = (W·diag(s))·mean(x) + (b + W·t), the mean over the pixels, which
    the norm commutes with. On a GPU ``forward`` runs through CUDA graphs where no gradient can be
    wanted.

    Beside ``forward`` there are ``forward_features``, ``forward_head`` and
    ``forward_intermediates``, and attributes such as ``feature_info``, as DSNet's.

    Args:
        module: as of :class:`Optimized`.
        original: likewise.
        classifier: the folded head, or None.
        graphs: CUDA graphs kept at most; 0 turns them off.
    """

    def __init__(
        self,
        module: nn.Module,
        original: "OrderedDict[str, Any]",
        classifier: Constants | None,
        graphs: int = 8,
    ) -> None:
        super().__init__(module, original)
        self.graphs = GraphCache(graphs)
        self.classifier = classifier
        self.eval()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.graphs.run(self._forward, x, self)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.classifier is None:
            return self.module(x)
        return F.linear(self.module.forward_stages(x).mean(dim=(2, 3)), *self.classifier.tensors())

    def warm_up(self, shapes: Iterable[Sequence[int]]) -> "OptimizedDSNet":
        """Prepares calls with images of these shapes, such as ``[(1, 3, 224, 224)]``.

        Everything that a first call compiles or packs is made; on a GPU the Triton kernels are
        compiled many at a time, and a CUDA graph of each shape is captured for the current stream.
        Autocast has no effect here; calls under it run without a graph.

        Args:
            shapes: of the images, (B, C, H, W); their dtype and device are those of the network.

        Returns:
            The network itself.

        Raises:
            ValueError: for a shape that the network does not take, or more shapes than graphs
                are kept.
        """
        weight = self.module.stages[0].embed.weight
        limit = self.graphs.limit
        with torch.inference_mode(), torch.autocast(weight.device.type, enabled=False):
            batches = [weight.new_zeros(shape) for shape in dict.fromkeys(map(tuple, shapes))]
            if len(batches) > limit and any(map(self.graphs.applies, batches)):
                raise ValueError(
                    f"shapes: expected at most {limit}, the number of graphs that dsnet.optimize"
                    f" was asked to keep, got {len(batches)}"
                )
            if weight.is_cuda:
                triton.compile_in_parallel(lambda: [self._forward(x) for x in batches])
            for x in batches:
                # The second call of a shape captures.
                self(x)
                self(x)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("reset_classifier", "prune_intermediate_layers", "set_grad_checkpointing"):
            raise AttributeError(f"{name}: do it before dsnet.optimize, to the model given to it")
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> "OptimizedDSNet":
        # Parameters may move, from under the graphs that read them.
        self.graphs.clear()
        return super()._apply(*args, **kwargs)
