"""CUDA graphs of a function of one image batch, kept by shape."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dsnet_kernels as kernels
from dsnet_kernels import checks, native

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

    def pool(self, x: Tensor) -> Any:
        """Memory for the graphs of one stream, and the stream to capture on.

        The allocator shares memory among captures on one stream alone.
        """
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(x.device)

    def capture(self, function: Function, x: Tensor, pool: Any) -> Function:
        """A replay of ``function`` for other values in x's place.

        The input is copied into a buffer that the graph reads, in channels_last, and the output
        cloned from what it writes. Graphs of one pool overwrite each other's intermediate values,
        so that their replays must not overlap.
        """
        handle, side = pool
        current = torch.cuda.current_stream(x.device)
        # An inference tensor could not be written to outside inference mode. A capture that fails
        # at its end leaves its stream current: the outer stream() restores the caller's.
        with (
            torch.cuda.device(x.device),
            torch.cuda.stream(current),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            buffer = torch.empty_like(x, memory_format=torch.channels_last)
            buffer.copy_(x)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(buffer)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The default stream of captures is one of the process's first device.
            with torch.cuda.graph(
                graph, pool=handle, stream=side, capture_error_mode="thread_local"
            ):
                result = function(buffer)

        def replay(x: Tensor) -> Output:
            buffer.copy_(x)
            graph.replay()
            return result.clone() if isinstance(result, Tensor) else [r.clone() for r in result]

        return replay


class Addresses:
    """Where the parameters and buffers of a module lie, read anew at every call.

    A graph reads the memory that it captured: values may change in place, but another tensor, or
    another module in its place, is at another address. Strides at one address have to stay.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._children: list[tuple[dict, dict]] = []
        self._tensors: list[dict] = []

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers, in the order of the modules."""
        # Walking the modules takes ten times as long as comparing what was found last time.
        if not self._children or any(now != before for now, before in self._children):
            modules = list(self._module.modules())
            self._children = [(each._modules, dict(each._modules)) for each in modules]
            self._tensors = [d for each in modules for d in (each._parameters, each._buffers)]
        return [t for d in self._tensors for t in d.values() if t is not None]

    def read(self) -> tuple[int, ...]:
        """The address of each."""
        return tuple(map(Tensor.data_ptr, self.tensors()))


@dataclass
class _Graph:
    """One kind of call: its replay once it is captured, and the memory of its stream's graphs."""

    place: tuple[torch.device, int]
    replay: Function | None = None
    pool: Any = None
    failed: bool = False


class GraphCache:
    """Runs a function through graphs, one for each kind of call.

    A kind is a shape, dtype, device, stream and backend, torch's TF32 flags and the addresses of
    the parameters. Its first call runs without a graph, so that a single one pays for none; the
    second captures. The graphs of a stream share their memory. The first capture that fails gives
    a RuntimeWarning; calls of such a kind run without a graph from then on.

    A call runs without a graph where gradients or tangents may be wanted, under autocast, function
    transforms and dispatch modes, while compiling or tracing, on a tensor that is no batch of
    images, and where ``cuda`` cannot capture. Copies and pickles of the cache have no graphs.

    Args:
        limit: kinds kept; the least recently used one leaves. 0 turns capturing off.
        cuda: the interface to CUDA.
    """

    def __init__(self, limit: int = 8, cuda: CudaGraphs | None = None) -> None:
        self.limit = limit
        self._cuda = CudaGraphs() if cuda is None else cuda
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._addresses: Addresses | None = None
        self._warned = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(graph.replay is not None for graph in self._graphs.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "cuda": self._cuda}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def clear(self) -> None:
        """Lets all graphs go, such as before their parameters move."""
        with self._lock:
            self._graphs.clear()

    def run(self, function: Function, x: Tensor, module: nn.Module) -> Output:
        """``function(x)``, which reads parameters and buffers of ``module``.

        Both have to be the same in every call.
        """
        if not self.applies(x):
            return function(x)
        place = (x.device, self._cuda.stream(x))
        # Replays of a graph share its buffers.
        with self._lock:
            if self._addresses is None:
                self._addresses = Addresses(module)
            flags = (native.tf32_allowed("conv"), native.tf32_allowed("matmul"))
            kind = (*place, x.shape, x.dtype, kernels.current_backend(), *flags)
            key = (*kind, self._addresses.read())
            replay = self._replay(key, function, x) if key in self._graphs else None
            if replay is not None:
                return replay(x)
        output = function(x)
        # A call that raises is of no kind: its error is the caller's, not a failed capture's.
        with self._lock:
            if key not in self._graphs:
                while len(self._graphs) >= self.limit:
                    self._graphs.popitem(last=False)
                self._graphs[key] = _Graph(place)
        return output

    def _replay(self, key: tuple, function: Function, x: Tensor) -> Function | None:
        """The graph of a kind of call, captured if there is none; None if that fails."""
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph.replay is None and not graph.failed:
            try:
                # A pool ends with its last graph.
                pools = (each.pool for each in self._graphs.values() if each.place == graph.place)
                graph.pool = next(filter(None, pools), None) or self._cuda.pool(x)
                graph.replay = self._cuda.capture(function, x, graph.pool)
            except Exception as error:  # A service goes on without graphs, out of memory or not.
                graph.failed, graph.pool = True, None
                self._warn(x, error)
        return graph.replay

    def _warn(self, x: Tensor, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"no CUDA graph of {tuple(x.shape)}, its calls run without: {first}",
            RuntimeWarning,
            stacklevel=2,
        )

    def applies(self, x: Tensor) -> bool:
        """Whether a call on x may run through a graph."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or checks.differentiates():
            return False
        # Function transforms such as vmap have tensors of their own; modes such as a counter of
        # FLOPs would see no operation in a replay.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        if torch._C._len_torch_dispatch_stack() > 0:
            return False
        # Subclasses are fakes and such, whose values no graph computes.
        if self.limit < 1 or type(x) is not Tensor or x.dim() != 4 or x.numel() == 0:
            return False
        return not torch.is_autocast_enabled(x.device.type) and self._cuda.can_capture(x)
