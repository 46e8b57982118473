"""CUDA graphs of an optimised network: when they are taken and kept, by a stand-in and on a GPU."""

import copy
import pickle

import pytest
import torch
from small_network import images, randomise, small

import dsnet
import dsnet_kernels
from dsnet.model import DSNetFeatures
from dsnet.optimized.graphs import GraphCache


class Recorder:
    """In the place of CudaGraphs: notes captures and replays, which call the function."""

    def __init__(self):
        self.captured, self.replayed = [], []
        self.current_stream, self.available = 0, True

    def can_capture(self, x):
        return self.available

    def stream(self, x):
        return self.current_stream

    def capture(self, function, x):
        self.captured.append(tuple(x.shape))

        def replay(x):
            self.replayed.append(tuple(x.shape))
            return function(x)

        return replay


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


def call(cache, size, times=2):
    x = torch.arange(float(size))
    for _ in range(times):
        assert torch.equal(cache.run(double, x), 2 * x)


def test_the_second_call_of_a_shape_captures_and_later_ones_replay(cache, cuda):
    call(cache, 3, times=1)
    assert (cuda.captured, cuda.replayed, len(cache)) == ([], [], 0)
    call(cache, 3, times=3)
    assert (cuda.captured, cuda.replayed, len(cache)) == ([(3,)], [(3,)] * 3, 1)


def test_the_least_recently_used_graph_leaves(cache, cuda):
    call(cache, 1)
    call(cache, 2)
    call(cache, 1, times=1)
    call(cache, 3)
    assert cuda.captured == [(1,), (2,), (3,)]
    assert len(cache) == 2
    call(cache, 1, times=1)
    assert cuda.captured == [(1,), (2,), (3,)]
    call(cache, 2)
    assert cuda.captured == [(1,), (2,), (3,), (2,)]
    assert len(cache) == 2


def test_changing_shapes_never_capture(cache, cuda):
    for size in range(1, 40):
        call(cache, size, times=1)
    assert (cuda.captured, len(cache)) == ([], 0)


def test_dtype_stream_and_backend_have_graphs_of_their_own(cuda):
    cache, x = GraphCache(limit=8, cuda=cuda), torch.ones(3)
    for _ in range(2):
        cache.run(double, x)
        cache.run(double, x.double())
        with dsnet_kernels.backend("reference"):
            cache.run(double, x)
        cuda.current_stream = 7
        cache.run(double, x)
        cuda.current_stream = 0
    assert len(cuda.captured) == len(cache) == 4


def test_no_graph_where_it_would_be_wrong(cache, cuda):
    x = torch.ones(3)
    for _ in range(3):
        with torch.enable_grad():
            cache.run(double, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache.run(double, x)
        cache.run(double, torch.ones(0))
        cache.run(double, torch.nn.Parameter(x))
        torch.compile(lambda x: cache.run(double, x), fullgraph=True, backend="eager")(x)
        cuda.available = False
        cache.run(double, x)
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


def test_a_failed_capture_is_told_and_tried_again(cache, cuda, monkeypatch):
    call(cache, 3, times=1)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "capture", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(cache, 3, times=1)
    call(cache, 3, times=1)
    assert cuda.captured == [(3,)]


def test_network_runs_through_its_cache_until_it_moves(cuda):
    model, x = small(), images()
    optimized = dsnet.optimize(model)
    optimized.graphs = GraphCache(limit=2, cuda=cuda)
    for _ in range(2):
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-10, atol=1e-10)
    assert cuda.captured == [(2, 3, 64, 64)]
    optimized.forward_features(x)
    assert len(cuda.replayed) == 1
    optimized.to(torch.float32)
    assert len(optimized.graphs) == 0


def test_networks_capture_only_where_there_is_a_gpu():
    optimized, x = dsnet.optimize(small()), images()
    for _ in range(3):
        optimized(x)
    assert len(optimized.graphs) == 0


# On a GPU


def on_gpu(cls, dtype, **kwargs):
    model = randomise(small(cls, **kwargs)).to("cuda", torch.float32)
    return model, dsnet.optimize(model, dtype=dtype)


def maps(output):
    return [output] if isinstance(output, torch.Tensor) else output


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [dsnet.DSNet, DSNetFeatures])
def test_replays_give_the_bits_of_plain_calls_for_new_inputs(cls, dtype, inference):
    _, optimized = on_gpu(cls, dtype)
    plain = copy.deepcopy(optimized)
    plain.graphs.limit = 0
    with torch.inference_mode(inference):
        kept = []
        for seed in range(4):
            x = images(batch=3, seed=seed).to("cuda", dtype)
            kept.append((optimized(x), plain(x)))
        # A later replay leaves earlier outputs alone.
        for got, expected in kept:
            for each, other in zip(maps(got), maps(expected), strict=True):
                assert torch.equal(each, other)
    assert len(optimized.graphs) == 1


@pytest.mark.gpu
def test_replays_outside_inference_mode_after_a_capture_in_it():
    _, optimized = on_gpu(dsnet.DSNet, torch.float32)
    x = images().to("cuda", torch.float32)
    with torch.inference_mode():
        expected = [optimized(x) for _ in range(2)][-1]
    assert torch.equal(optimized(x), expected)
    assert len(optimized.graphs) == 1


@pytest.mark.gpu
def test_streams_have_graphs_of_their_own_on_a_gpu():
    _, optimized = on_gpu(dsnet.DSNet, torch.float32)
    x = images().to("cuda", torch.float32)
    expected = optimized(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = [optimized(x) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    optimized(x)
    assert len(optimized.graphs) == 2
    assert all(torch.equal(result, expected) for result in results)
