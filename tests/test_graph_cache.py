"""The cache of CUDA graphs, on a stand-in: when a graph is captured, replayed and dropped."""

import copy
import pickle
import threading
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from graph_recorder import Recorder
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import dsnet_kernels
from dsnet.optimized.graphs import CudaGraphs, GraphCache


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def cuda():
    return Recorder()


@pytest.fixture
def cache(cuda):
    return GraphCache(limit=2, cuda=cuda)


def double(x):
    return 2 * x


NOTHING = nn.Identity()
"""A module without parameters, which ``double`` reads."""


def batch(size, dtype=torch.float32):
    return torch.arange(float(size), dtype=dtype).view(1, 1, 1, size)


def call(cache, size, times=2):
    x = batch(size)
    for _ in range(times):
        assert torch.equal(cache.run(double, x, NOTHING), 2 * x)


def test_the_second_call_of_a_shape_captures_and_later_ones_replay(cache, cuda):
    call(cache, 3, times=1)
    assert (cuda.captured, cuda.replayed, len(cache)) == ([], [], 0)
    call(cache, 3, times=3)
    assert (cuda.captured, cuda.replayed, len(cache)) == ([(1, 1, 1, 3)], [(1, 1, 1, 3)] * 3, 1)


def test_the_least_recently_used_graph_leaves(cache, cuda):
    call(cache, 1)
    call(cache, 2)
    call(cache, 1, times=1)
    call(cache, 3)
    assert cuda.captured == [(1, 1, 1, n) for n in (1, 2, 3)]
    assert len(cache) == 2
    call(cache, 1, times=1)
    assert cuda.captured == [(1, 1, 1, n) for n in (1, 2, 3)]
    call(cache, 2)
    assert cuda.captured == [(1, 1, 1, n) for n in (1, 2, 3, 2)]
    assert len(cache) == 2


def test_changing_shapes_never_capture(cache, cuda):
    for size in range(1, 40):
        call(cache, size, times=1)
    assert (cuda.captured, len(cache)) == ([], 0)


def test_dtype_stream_and_backend_have_graphs_of_their_own(cuda):
    cache, x = GraphCache(limit=8, cuda=cuda), batch(3)
    for _ in range(2):
        cache.run(double, x, NOTHING)
        cache.run(double, x.double(), NOTHING)
        with dsnet_kernels.backend("reference"):
            cache.run(double, x, NOTHING)
        cuda.current_stream = 7
        cache.run(double, x, NOTHING)
        cuda.current_stream = 0
    assert len(cuda.captured) == len(cache) == 4


def test_graphs_of_a_stream_share_a_pool_which_ends_with_its_last_graph(cache, cuda):
    call(cache, 1)
    call(cache, 2)
    cuda.current_stream = 7
    call(cache, 3)
    assert cuda.pools == ["pool 0 of stream 0", "pool 0 of stream 0", "pool 2 of stream 7"]
    call(cache, 4)
    cuda.current_stream = 0
    call(cache, 1)
    assert cuda.pools[3:] == ["pool 2 of stream 7", "pool 4 of stream 0"]


def test_no_graph_where_it_would_be_wrong(cache, cuda):
    x = batch(3)
    for _ in range(3):
        with torch.enable_grad():
            cache.run(double, x, NOTHING)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache.run(double, x, NOTHING)
        cache.run(double, batch(0), NOTHING)
        cache.run(double, x[0], NOTHING)
        cache.run(double, torch.nn.Parameter(x), NOTHING)
        torch.compile(lambda x: cache.run(double, x, NOTHING), fullgraph=True, backend="eager")(x)
        torch.vmap(lambda x: cache.run(double, x, NOTHING))(x[None])
        with FlopCounterMode(display=False):
            cache.run(double, x, NOTHING)
        cuda.available = False
        cache.run(double, x, NOTHING)
        cuda.available = True
    assert (cuda.captured, len(cache)) == ([], 0)
    cache.limit = 0
    call(cache, 3, times=3)
    assert cuda.captured == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_without_graphs(duplicate, cache):
    call(cache, 3, times=2)
    twin = duplicate(GraphCache(limit=5))
    assert (twin.limit, len(twin)) == (5, 0)
    assert len(copy.deepcopy(cache)) == 0
    assert len(cache) == 1


def test_a_failed_capture_is_told_once_and_not_tried_again(cache, cuda):
    call(cache, 3, times=1)
    cuda.error = RuntimeError("CUDA out of memory.\nmore")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(cache, 3, times=3)
        call(cache, 4, times=3)
    (message,) = (str(warning.message) for warning in told)
    assert message.startswith("no CUDA graph of (1, 1, 1, 3), its calls run without: CUDA out of")
    assert "more" not in message
    cuda.error = None
    call(cache, 3)
    assert (cuda.captured, len(cache)) == ([], 0)
    call(cache, 5)
    assert cuda.captured == [(1, 1, 1, 5)]


def test_tangents_are_kept_where_a_graph_of_the_shape_exists(cache, cuda):
    call(cache, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(batch(3), torch.ones(1, 1, 1, 3))
        tangent = forward_ad.unpack_dual(cache.run(double, dual, NOTHING)).tangent
    assert torch.equal(tangent, torch.full((1, 1, 1, 3), 2.0))
    assert len(cuda.replayed) == 1


def test_a_call_that_raises_is_no_failed_capture(cache, cuda):
    def fails(x):
        raise ValueError("x: expected an image")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with pytest.raises(ValueError, match="x: expected an image"):
                cache.run(fails, batch(3), NOTHING)
    cuda.error = RuntimeError("out of memory")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        call(cache, 3)


@pytest.mark.parametrize("flags", [torch.backends.cudnn.conv, torch.backends.cuda.matmul])
def test_graphs_follow_the_flags_of_tf32(cache, cuda, flags):
    before = flags.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            flags.fp32_precision = precision
            call(cache, 3)
    finally:
        flags.fp32_precision = before
    assert len(cuda.captured) == 2


def test_clearing_waits_for_a_replay(cache, cuda):
    call(cache, 3)
    with cache._lock:
        thread = threading.Thread(target=cache.clear)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert len(cache) == 1
    thread.join()
    assert len(cache) == 0


def test_a_capture_that_fails_at_its_end_leaves_the_caller_s_stream(monkeypatch):
    class Capture:
        """As torch's: where the end of the capture raises, its stream stays."""

        def __init__(self, graph, stream, **_):
            self.stream = stream

        def __enter__(self):
            current[0] = self.stream

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    class Stream(str):
        def wait_stream(self, other):
            pass

    @contextmanager
    def restoring(name):
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    current, side = [Stream("the caller's")], Stream("side")
    for name, value in {
        "device": lambda _: nullcontext(),
        "current_stream": lambda *_: current[0],
        "stream": restoring,
        "CUDAGraph": object,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaGraphs().capture(double, batch(3), (None, side))
    assert current[0] == "the caller's"
