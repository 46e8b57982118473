"""CUDA graphs of an optimised network: when they are taken and kept, by a stand-in and on a GPU."""

import copy
import pickle
import threading
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from small_network import backends_chosen, images, randomise, small
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import dsnet
import dsnet_kernels
from dsnet.model import DSNetFeatures
from dsnet.optimized.graphs import CudaGraphs, GraphCache


class Recorder:
    """In the place of CudaGraphs: notes captures and replays, which call the function.

    As a graph does, a replay reads the memory of the parameters that were captured.
    """

    def __init__(self):
        self.captured, self.replayed, self.pools = [], [], []
        self.current_stream, self.available = 0, True
        self.error = None

    def can_capture(self, x):
        return self.available

    def stream(self, x):
        return self.current_stream

    def pool(self, x):
        return f"pool {len(self.captured)} of stream {self.current_stream}"

    def capture(self, function, x, pool):
        if self.error is not None:
            raise self.error
        self.captured.append(tuple(x.shape))
        self.pools.append(pool)
        captured = [] if self.watched is None else [p.detach() for p in self.watched.parameters()]

        def replay(x):
            self.replayed.append(tuple(x.shape))
            if self.watched is None:
                return function(x)
            names = [name for name, _ in self.watched.named_parameters()]
            graph = copy.deepcopy(self.watched)
            for name, memory in zip(names, captured, strict=True):
                owner, _, leaf = name.rpartition(".")
                setattr(graph.get_submodule(owner), leaf, nn.Parameter(memory, False))
            return graph._forward(x)

        return replay

    watched = None
    """An optimised network, whose replays compute with the memory that was captured."""


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


# Networks


def optimised(cuda, limit=2, **kwargs):
    """An optimised network with parameters that all count, and its graphs stood in for."""
    model = dsnet.optimize(randomise(small(**kwargs)))
    model.graphs = GraphCache(limit=limit, cuda=cuda)
    cuda.watched = model
    return model


def expected(model, x):
    """The output with the present parameters, without a graph."""
    twin = copy.deepcopy(model)
    twin.graphs.limit = 0
    return twin(x)


def test_network_runs_through_its_cache_until_it_moves(cuda):
    optimized, x = optimised(cuda), images(32, 32)
    for _ in range(2):
        assert torch.equal(optimized(x), expected(optimized, x))
    assert cuda.captured == [(2, 3, 32, 32)]
    optimized.forward_features(x)
    assert len(cuda.replayed) == 1
    optimized.to(torch.float32)
    assert len(optimized.graphs) == 0


def replaced_parameter(model):
    weight = model.module.stages[0].blocks[0].fuse
    weight.weight = nn.Parameter(2 * weight.weight, requires_grad=False)


def new_data(model):
    weight = model.module.stages[0].blocks[0].fuse.weight
    weight.data = 2 * weight.data


def moved_inside(model):
    model.module.float().double()


def moved_stage(model):
    model.module.stages[0].float().double()


def replaced_module(model):
    mlp = copy.deepcopy(model.module.stages[1].blocks[0].mlp)
    mlp.fc1_bias.mul_(2)
    model.module.stages[1].blocks[0].mlp = mlp


@pytest.mark.parametrize(
    "change", [replaced_parameter, new_data, moved_inside, moved_stage, replaced_module]
)
def test_a_graph_is_not_replayed_with_parameters_that_left(cuda, change):
    optimized, x = optimised(cuda), images(32, 32)
    optimized(x)
    optimized(x)
    change(optimized)
    now = expected(optimized, x)
    for _ in range(3):
        assert torch.equal(optimized(x), now)
    assert len(cuda.captured) == 2


def test_values_changed_in_place_are_read_by_the_graph(cuda):
    optimized, x = optimised(cuda), images(32, 32)
    optimized(x)
    optimized(x)
    optimized.module.stages[0].blocks[0].fuse.weight.mul_(2)
    assert torch.equal(optimized(x), expected(optimized, x))
    assert len(cuda.captured) == 1


def test_a_functional_call_has_graphs_of_its_own_parameters(cuda):
    optimized, x = optimised(cuda), images(32, 32)
    own = dict(optimized.named_parameters())
    other = {name: 1.5 * parameter for name, parameter in own.items()}
    optimized(x)
    before = optimized(x)
    results = [torch.func.functional_call(optimized, other, x) for _ in range(2)]
    assert not torch.allclose(results[0], before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(optimized(x), before)
    assert len(cuda.captured) == len(optimized.graphs) == 2


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 4, 32, 32)])
def test_a_wrong_image_is_the_network_s_error_every_time(cuda, shape):
    optimized = optimised(cuda)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\)"):
            optimized(torch.zeros(shape))
    assert len(optimized.graphs) == 0


def test_warm_up_captures_each_shape(cuda):
    optimized = optimised(cuda)
    assert optimized.warm_up([(1, 3, 32, 32), (2, 3, 32, 32)]) is optimized
    assert cuda.captured == [(1, 3, 32, 32), (2, 3, 32, 32)]
    x = images(32, 32)
    assert torch.equal(optimized(x), expected(optimized, x))
    assert len(cuda.captured) == 2
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\)"):
        optimized.warm_up([(1, 4, 32, 32)])


def test_warm_up_takes_no_more_shapes_than_graphs_are_kept(cuda):
    optimized = optimised(cuda)
    with pytest.raises(ValueError, match=r"shapes: expected at most 2, .* got 3"):
        optimized.warm_up([(batch, 3, 32, 32) for batch in (1, 2, 3)])
    assert cuda.captured == []
    optimized.warm_up([(1, 3, 32, 32)] * 3)
    cuda.available = False
    optimized.warm_up([(batch, 3, 32, 32) for batch in (1, 2, 3)])
    assert cuda.captured == [(1, 3, 32, 32)]


def test_warm_up_captures_under_autocast_too(cuda):
    optimized = optimised(cuda)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimized.warm_up([(1, 3, 32, 32)])
    assert cuda.captured == [(1, 3, 32, 32)]


def test_warm_up_of_a_module_warms_up_the_networks_inside(cuda):
    optimized = dsnet.optimize(nn.Sequential(randomise(small())))
    optimized.module[0].graphs = GraphCache(limit=2, cuda=cuda)
    assert optimized.warm_up([(1, 3, 32, 32)]) is optimized
    assert cuda.captured == [(1, 3, 32, 32)]
    with pytest.raises(ValueError, match="expected a DSNet inside, got Sequential"):
        dsnet.optimize(nn.Sequential(small().stages[0])).warm_up([(1, 3, 32, 32)])


@pytest.mark.parametrize("graphs", [0, 3])
def test_the_bound_is_an_argument(graphs):
    assert dsnet.optimize(small(), graphs=graphs).graphs.limit == graphs


def test_networks_within_other_modules_have_graphs(cuda):
    backbone = randomise(small(DSNetFeatures, out_indices=(1, 3)))
    model = nn.ModuleDict({"backbone": backbone, "same": backbone, "net": randomise(small())})
    model.forward = lambda x: (model["backbone"](x), model["net"](x))
    x = images(32, 32)
    maps, logits = model(x)
    optimized = dsnet.optimize(model, graphs=3).module
    assert optimized["same"] is optimized["backbone"]
    for name in ("backbone", "net"):
        assert optimized[name].graphs.limit == 3
        optimized[name].graphs = GraphCache(limit=3, cuda=cuda)
        assert list(optimized[name].original_state_dict()) == list(model[name].state_dict())
    assert optimized["backbone"].feature_info.channels() == [32, 64]
    for _ in range(3):
        for got, map_ in zip(optimized["backbone"](x), maps, strict=True):
            torch.testing.assert_close(got, map_, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(optimized["net"](x), logits, rtol=1e-9, atol=1e-9)
    assert cuda.captured == [(2, 3, 32, 32)] * 2
    optimized.float()
    assert len(optimized["net"].graphs) == 0


def test_a_network_in_a_shared_container_is_replaced_once():
    box = nn.Sequential(randomise(small()))
    optimized = dsnet.optimize(nn.ModuleDict({"a": box, "b": box})).module
    assert optimized["a"][0] is optimized["b"][0]
    assert isinstance(optimized["a"][0].module, dsnet.DSNet)


class Doubled(dsnet.DSNet):
    def forward(self, x):
        return {"logits": 2 * super().forward(x)}


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_a_network_with_a_forward_of_its_own_keeps_it_without_graphs(cuda, wrap):
    model, x = wrap(randomise(small(Doubled, num_classes=7))), images(32, 32)
    optimized = dsnet.optimize(model)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-9, atol=1e-9)
    assert not hasattr(optimized, "graphs") or optimized.graphs.limit == 0


def test_networks_capture_only_where_there_is_a_gpu():
    optimized, x = dsnet.optimize(small()), images()
    for _ in range(3):
        optimized(x)
    assert len(optimized.graphs) == 0


# On a GPU


def on_gpu(cls, dtype, **kwargs):
    model = randomise(small(cls, **kwargs)).to("cuda", torch.float32)
    chosen = set(backends_chosen(copy.deepcopy(model).to(dtype), images().to("cuda", dtype)))
    assert dtype == torch.float32 or chosen <= {"cuda", "triton"}
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
