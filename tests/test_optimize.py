"""Optimised networks: the original's results, copies, compilation, other modules."""

import copy
import io
import pickle

import pytest
import torch
from small_network import SMALL, backends_chosen, images, randomise, small
from torch import nn

import dsnet
from dsnet.model import DSNet, DSNetFeatures
from dsnet.optimized import Optimized, OptimizedBlock
from dsnet.optimized.fold import constant_affine, fold_into_linear
from dsnet_kernels import native

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def network(dtype=torch.float64, **kwargs):
    """Every parameter and statistic counts, and logits depend on the image."""
    return randomise(small(dtype=torch.float64, **kwargs)).to(dtype)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# Results


def test_small_networks_run_the_kernels():
    model, x = network(), images()
    chosen = set(backends_chosen(model, x))
    assert chosen == ({"cpu"} if native.CPU.refusal is None else {"sdpa", "reference"})
    assert set(backends_chosen(dsnet.optimize(model), x)) == chosen


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_equals_the_original_for_every_share_of_the_streams(alpha, alignment, backend):
    model, x = network(alpha=alpha, alignment=alignment), images(65, 97)
    optimized = dsnet.optimize(model, backend=backend)
    assert relative(optimized(x), model(x)) < 1e-10


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_block_equals_the_original_where_the_streams_differ_in_width(alpha):
    block = randomise(dsnet.DSBlock(20, 2, 4, alpha=alpha).double()).eval()
    x = images(9, 14, channels=20)
    optimized = dsnet.optimize(block)
    for got, expected in zip(optimized.forward_streams(x), block.forward_streams(x), strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < 1e-10


def test_rounded_weights_are_exact_at_the_running_mean():
    norm, layer = randomise(nn.BatchNorm2d(16).double()).eval(), nn.Linear(16, 8).double()
    norm.running_mean.mul_(30)
    weight, bias = fold_into_linear(norm, "norm", layer.weight, layer.bias, torch.bfloat16)
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float64)
    scale, shift = constant_affine(norm, "norm")
    rounding = (layer.weight * scale - weight.double()).norm()
    assert rounding > 1e-4
    mean = norm.running_mean
    expected = layer(norm(mean.view(1, -1, 1, 1)).flatten(1))
    assert relative(mean @ weight.double().T + bias, expected[0]) < 1e-12
    assert relative(shift + scale * mean, norm.bias) < 1e-12


def test_every_constant_counts():
    block = randomise(dsnet.DSBlock(16, 2, 2).double()).eval()
    optimized, x = dsnet.optimize(block), images(6, 8, channels=16)
    expected = optimized(x)
    for name, constant in optimized.named_parameters():
        kept = constant.clone()
        constant.mul_(1.01)
        assert relative(optimized(x), expected) > 1e-8, name
        constant.copy_(kept)
    assert torch.equal(optimized(x), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (95, 128)])
@pytest.mark.parametrize("global_reduction", [(8, 4, 2, 1), (8, 4, 2, 2), (1, 1, 1, 1)])
def test_equals_the_original_at_any_size_and_reduction(size, global_reduction):
    model, x = network(global_reduction=global_reduction), images(*size)
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_errors_are_within_twice_those_of_the_original(dtype, autocast, backend):
    # The mean over several networks, of which one may round well by chance.
    ratios = []
    for seed in range(6):
        exact = randomise(small(), seed)
        plain = copy.deepcopy(exact).to(dtype)
        exact.load_state_dict(plain.state_dict())
        optimized = dsnet.optimize(exact, dtype=dtype, backend=backend)
        x = images(batch=4, seed=seed).to(dtype)
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ratios.append(relative(optimized(x), expected) / relative(plain(x), expected))
    ratio = torch.tensor(ratios).log().mean().exp().item()
    print(f"{ratio:.2f} times the original's error")
    assert 0.1 < ratio < 2


def test_folding_is_as_exact_as_float64_whatever_the_dtype():
    model, x = network(torch.float32), images()
    exact = copy.deepcopy(model).double()
    optimized = dsnet.optimize(model, dtype=torch.float64)
    # LayerNorm's parameters and the like are float32 numbers in both.
    assert relative(optimized(x), exact(x)) < 1e-10


def test_parts_of_the_forward_equal_the_original():
    model, x = network(), images(64, 96)
    optimized = dsnet.optimize(model)
    features = optimized.forward_features(x)
    assert relative(features, model.forward_features(x)) < 1e-10
    assert relative(optimized.forward_head(features), model(x)) < 1e-10
    pooled = optimized.forward_head(features, pre_logits=True)
    assert relative(pooled, model.forward_head(features, pre_logits=True)) < 1e-10
    last, stages = optimized.forward_intermediates(x, [1, 3], norm=True, streams=True)
    expected_last, expected_stages = model.forward_intermediates(x, [1, 3], norm=True, streams=True)
    assert relative(last, expected_last) < 1e-10
    for stage, expected_stage in zip(stages, expected_stages, strict=True):
        for got, expected in zip(stage, expected_stage, strict=True):
            assert relative(got, expected) < 1e-10


@pytest.mark.parametrize("classes", [0, 7])
def test_network_without_a_classifier_or_pooling(classes):
    model, x = network(num_classes=classes), images()
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10
    model.reset_classifier(0, global_pool="")
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10


def test_another_head_keeps_its_own_forward():
    model, x = network(), images()
    model.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10
    model.head = nn.Linear(64, 3, bias=False).double()
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10


def test_backbone_keeps_its_maps_and_what_describes_them():
    model, x = randomise(small(DSNetFeatures, out_indices=(1, 3))), images(64, 96)
    optimized = dsnet.optimize(model)
    for got, expected in zip(optimized(x), model(x), strict=True):
        assert relative(got, expected) < 1e-10
    assert optimized.feature_info.channels() == [32, 64]


def test_sync_and_frozen_norms_are_folded_too():
    model, x = network(), images()
    expected = model(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert relative(dsnet.optimize(synced)(x), expected) < 1e-10
    model.stages[0].blocks[0].norm.affine = False
    model.stages[0].blocks[0].norm.weight = model.stages[0].blocks[0].norm.bias = None
    assert relative(dsnet.optimize(model)(x), model(x)) < 1e-10


# The module


def test_no_norm_of_a_batch_is_left_and_nothing_wants_a_gradient():
    optimized = dsnet.optimize(network())
    assert not any(isinstance(module, NORMS) for module in optimized.modules())
    assert not any(isinstance(module, dsnet.DSBlock) for module in optimized.modules())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    assert not any(module.training for module in optimized.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_original_is_untouched(training):
    model = network().train(training)
    before, modules = bits(model), list(model.modules())
    optimized = dsnet.optimize(model, dtype=torch.bfloat16)
    for parameter in optimized.parameters():
        parameter.zero_()
    assert_same_state(model.state_dict(), before)
    assert list(model.modules()) == modules
    assert all(module.training == training for module in modules)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_original_state_dict_is_recovered_bit_for_bit(dtype):
    model = network(torch.float32)
    before = bits(model)
    optimized = dsnet.optimize(model, dtype=dtype)
    for tensor in (*model.parameters(), *optimized.parameters()):
        tensor.zero_()
    recovered = optimized.original_state_dict()
    assert_same_state(recovered, before)
    recovered["head.weight"].zero_()
    assert_same_state(optimized.original_state_dict(), before)
    DSNet(SMALL, num_classes=7).load_state_dict(optimized.original_state_dict())


def test_dtype_is_that_of_every_weight_and_float32_that_of_constants():
    optimized = dsnet.optimize(network(), dtype=torch.bfloat16)
    weights = [p for p in optimized.parameters() if p.dim() > 1]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    assert {p.dtype for p in optimized.parameters()} == {torch.bfloat16, torch.float32}
    assert optimized(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_and_pickles_give_the_same_bits():
    model, x = network(), images()
    optimized = dsnet.optimize(model)
    expected, file = optimized(x), io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    copies = (
        copy.deepcopy(optimized),
        pickle.loads(pickle.dumps(optimized)),
        torch.load(file, weights_only=False),
    )
    for each in copies:
        assert torch.equal(each(x), expected)
        assert_same_state(each.original_state_dict(), model.state_dict())


def test_calls_in_inference_mode_and_after_it_agree():
    model, x = network(), images()
    with torch.inference_mode():
        optimized = dsnet.optimize(model)
        expected = optimized(x)
    with torch.enable_grad():
        leaf = x.requires_grad_()
        got = optimized(leaf)
        got.sum().backward()
    assert relative(got, expected) < 1e-12
    assert leaf.grad.abs().max() > 0


def test_compiles_as_one_graph():
    model, x = network(), images()
    torch._dynamo.reset()
    compiled = torch.compile(dsnet.optimize(model), fullgraph=True, backend="eager", dynamic=False)
    assert relative(compiled(x), model(x)) < 1e-10
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_exports_with_a_dynamic_batch(backend):
    model = network()
    shapes = {"x": {0: torch.export.Dim("b", max=64)}}
    optimized = dsnet.optimize(model, backend=backend)
    exported = torch.export.export(optimized, (images(),), dynamic_shapes=shapes).module()
    x = images(batch=3, seed=2)
    assert relative(exported(x), model(x)) < 1e-10


# Blocks in other modules


class Detector(nn.Module):
    """A network, a block that two names share, and a norm of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = small(DSNetFeatures, dtype=None, out_indices=(2, 3))
        self.norm = nn.BatchNorm2d(64)
        self.levels = nn.ModuleList([dsnet.DSBlock(64, 4, 1)])
        self.last = self.levels[0]

    def forward(self, x, factor=1.0):
        return {"out": factor * self.last(self.levels[0](self.norm(self.backbone(x)[-1])))}

    def classes(self):
        return 80


def test_blocks_in_another_module_are_optimised_and_the_rest_stays():
    model, x = randomise(Detector().double()).eval(), images()
    optimized = dsnet.optimize(model)
    assert type(optimized) is Optimized
    assert relative(optimized(x, factor=2.0)["out"], model(x, factor=2.0)["out"]) < 1e-10
    assert not any(isinstance(module, dsnet.DSBlock) for module in optimized.modules())
    assert type(optimized.module.norm) is nn.BatchNorm2d
    assert optimized.last is optimized.levels[0]
    assert type(optimized.last) is OptimizedBlock
    assert optimized.classes() == 80
    assert_same_state(optimized.original_state_dict(), model.state_dict())
    half = dsnet.optimize(model, dtype=torch.bfloat16)
    assert half.module.norm.weight.dtype == torch.bfloat16
    assert relative(half(x.bfloat16())["out"], model(x)["out"]) < 0.1


def test_network_in_another_module_has_its_norm_folded():
    model, x = nn.Sequential(network(), nn.Softmax(dim=1)).eval(), images()
    optimized = dsnet.optimize(model)
    assert relative(optimized(x), model(x)) < 1e-10
    assert not any(isinstance(module, NORMS) for module in optimized.modules())
