"""CUDA graphs of an optimised network, on a stand-in and on a GPU."""

import copy

import pytest
import torch
from graph_recorder import Recorder
from small_network import backends_chosen, images, randomise, small
from torch import nn

import dsnet
from dsnet.model import DSNetFeatures
from dsnet.optimized.graphs import GraphCache


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def cuda():
    return Recorder()


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
