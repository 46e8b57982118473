"""Timing on the device: events around a call that finds its inputs outside the caches."""

import time
from collections.abc import Callable
from functools import partial

import torch

from dsnet.bench.timing import Sample, measure

EVICTION_BYTES = 512 << 20
"""Read before every call: several times any L2, and long enough to hide the launch behind it."""

GRAPH_WARM_UP = 3


def timer(device: str, rounds: tuple[int, int] = (10, 40)) -> Callable[..., dict]:
    """:func:`dsnet.bench.timing.measure` on ``device``, with cold caches."""
    if device == "cuda":
        return partial(measure, sample=_event_sample(), min_sample=2e-4, rounds=rounds)
    return partial(measure, sample=_clock_sample(), min_sample=0.0, rounds=(3, 3))


def _event_sample() -> Sample:
    buffer = torch.zeros(EVICTION_BYTES // 4, dtype=torch.int32, device="cuda")

    def sample(call: Callable[[], object], repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            # Reading leaves no lines to write back, as writing would.
            buffer.amax()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / repeats

    return sample


def _clock_sample() -> Sample:
    buffer = torch.zeros(1 << 10, dtype=torch.int32)

    def sample(call: Callable[[], object], repeats: int) -> float:
        seconds = 0.0
        for _ in range(repeats):
            buffer.amax()
            start = time.perf_counter()
            call()
            seconds += time.perf_counter() - start
        return seconds / repeats

    return sample


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """``call`` as a CUDA graph that replays into the same outputs; on the CPU the call itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay
