"""Timing, graphs, launches and memory of calls on an NVIDIA GPU."""

import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import Sample

EVICTION_BYTES = 512 << 20
"""Read before every call: several times any L2, and long enough to hide the launch."""

WARM_UP = 3
"""Calls before a capture: libraries choose their algorithms in them."""


def warm_sample() -> Sample:
    """Times calls one after another between two events: the time per call of a busy loop."""

    def sample(call: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    return sample


def cold_sample() -> Sample:
    """Times each call between its own two events, with inputs outside the caches."""
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


def captured(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """Returns a replay of a CUDA graph of ``calls`` calls, into the same outputs every time.

    One pair of events cannot resolve a call of a few microseconds: with many calls in a graph the
    time per call is that of the replay over their number.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            outputs = call()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def count_launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call runs on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which ``call`` raises the allocated memory at most, outputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def properties() -> dict[str, Any]:
    """Name, capability, processors, memory and driver of the current GPU."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """The driver's version by nvidia-smi; None where that does not run."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def versions() -> dict[str, str]:
    """CUDA runtime and cuDNN that torch was built with."""
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
