"""CUDA graphs of a function of one image batch, kept by shape."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dsnet_kernels as kernels

WARM_UPS = 3
"""Runs before a capture, in which libraries choose their algorithms and allocate."""

Output = Tensor | list[Tensor]
Function = Callable[[Tensor], Output]


class CudaGraphs:
    """What :class:`GraphCache` needs of CUDA; tests put another in its place."""

    def can_capture(self, x: Tensor) -> bool:
        """Whether x's device has graphs."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def stream(self, x: Tensor) -> int:
        """The stream that a call on x runs on."""
        return torch.cuda.current_stream(x.device).cuda_stream

    def capture(self, function: Function, x: Tensor) -> Function:
        """A replay of ``function`` for other values in x's place.

        The input is copied into a buffer that the graph reads, in channels_last, and the output
        cloned from what it writes.
        """
        # An inference tensor could not be written to outside inference mode.
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty_like(x, memory_format=torch.channels_last)
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            buffer.copy_(x)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(buffer)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The default stream of captures is one of the process's first device.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = function(buffer)

        def replay(x: Tensor) -> Output:
            buffer.copy_(x)
            graph.replay()
            return result.clone() if isinstance(result, Tensor) else [r.clone() for r in result]

        return replay


class GraphCache:
    """Runs a function through graphs, one for each shape, dtype, device, stream and backend.

    The first call of a kind runs as it is, so that a single one pays for no graph, the second
    captures. Without graphs run all calls where gradients may be wanted, under autocast, while
    compiling or tracing, and where ``cuda`` cannot capture. Copies and pickles start without any.

    Args:
        limit: kinds kept; the least recently used one leaves. 0 turns capturing off.
        cuda: the interface to CUDA.
    """

    def __init__(self, limit: int = 8, cuda: CudaGraphs | None = None) -> None:
        self.limit = limit
        self._cuda = CudaGraphs() if cuda is None else cuda
        self._replays: OrderedDict[tuple, Function | None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._replays.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "cuda": self._cuda}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def clear(self) -> None:
        """Lets all graphs go, such as before their parameters move."""
        self._replays.clear()

    def run(self, function: Function, x: Tensor) -> Output:
        """``function(x)``; the function has to be the same in every call."""
        if not self._applies(x):
            return function(x)
        key = (x.shape, x.dtype, x.device, self._cuda.stream(x), kernels.current_backend())
        # Replays of a graph share its buffers.
        with self._lock:
            replay = self._replay(key, function, x)
            if replay is not None:
                return replay(x)
        return function(x)

    def _replay(self, key: tuple, function: Function, x: Tensor) -> Function | None:
        """The graph of this kind of call, captured in the second one; None in the first."""
        if key not in self._replays:
            while len(self._replays) >= self.limit:
                self._replays.popitem(last=False)
            self._replays[key] = None
            return None
        self._replays.move_to_end(key)
        if self._replays[key] is None:
            self._replays[key] = self._cuda.capture(function, x)
        return self._replays[key]

    def _applies(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        # Subclasses are fakes and such, whose values no graph computes.
        if self.limit < 1 or type(x) is not Tensor or x.numel() == 0:
            return False
        return not torch.is_autocast_enabled(x.device.type) and self._cuda.can_capture(x)
