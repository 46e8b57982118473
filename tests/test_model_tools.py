"""The network in other precisions and layouts, copied, compiled, exported, checkpointed."""

import copy
import io
import pickle

import pytest
import torch
from small_network import SMALL, images, small

import dsnet
from dsnet.model import DSNet, DSNetFeatures

# Precisions and layouts


def test_bfloat16_model_is_close_to_float64():
    exact, x = small(), images()
    expected = exact(x)
    got = copy.deepcopy(exact).bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.05 * expected.norm()


def test_autocast_runs_in_bfloat16_and_trains_float32_parameters():
    model, x = small(dtype=torch.float32), images(dtype=torch.float32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
        loss = model.train()(x).float().square().mean()
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_float64_model_computes_in_float64_throughout():
    model, dtypes = small(), set()
    for module in model.modules():
        module.register_forward_hook(lambda m, a, out: dtypes.update(leaves(out)))
    model(images())
    assert dtypes == {torch.float64}
    single = copy.deepcopy(model).float()(images().float())
    error = (single.double() - model(images())).abs().max()
    assert 0 < error < 1e-4


def leaves(out):
    return {t.dtype for t in (out if isinstance(out, tuple) else (out,)) if t is not None}


def test_memory_formats_give_the_same_numbers():
    nchw, x = small(), images(64, 96)
    nhwc = copy.deepcopy(nchw).to(memory_format=torch.channels_last)
    expected = nchw(x)
    for model in (nchw, nhwc):
        for layout in (torch.contiguous_format, torch.channels_last):
            got = model(x.contiguous(memory_format=layout))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_convolutions_are_built_channels_last():
    weight = dsnet.create_model("dsnet_tiny").stages[0].embed.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_results_do_not_depend_on_the_rest_of_the_batch():
    model, x = small(), images(batch=3)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-12, atol=1e-12)


# Copies, compilation, export


def test_meta_model_takes_memory_and_weights_later():
    source = small()
    with torch.device("meta"):
        model = DSNet(SMALL, num_classes=7)
    assert all(t.is_meta for t in model.state_dict().values())
    model = model.to_empty(device="cpu").double()
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.eval()(images()), source(images()))


def test_copies_give_the_same_output():
    model, x = small(), images()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = DSNet(SMALL, num_classes=7).double().eval()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        assert torch.equal(other(x), expected)
    backbone = small(DSNetFeatures, out_indices=(1, 3))
    twin = pickle.loads(pickle.dumps(backbone))
    assert twin.feature_info.channels() == backbone.feature_info.channels() == [32, 64]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_stage_compiles_as_one_graph_with_dynamic_shapes(dynamo):
    stage = small(backend="reference").stages[1]
    compiled = torch.compile(stage, fullgraph=True, backend="eager", dynamic=True)
    compiled(images(18, 24, channels=16))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((37, 40, 3), (32, 16, 5)):
            x = images(*shape, channels=16)
            torch.testing.assert_close(compiled(x), stage(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_network_compiles_as_one_graph(dynamo):
    model, x = small(backend="reference"), images(64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_block_compiles_as_one_graph_for_training(dynamo):
    torch.manual_seed(0)
    block = dsnet.DSBlock(8, 2, 2, drop_path=0.2, backend="reference").double().train()
    twin, x = copy.deepcopy(block), images(6, 8, channels=8)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for forward, module in ((block, block), (compiled, twin)):
        torch.manual_seed(1)
        out = forward(x)
        out.square().sum().backward()
        grads = [p.grad for p in module.parameters()]
        results.append([out, *grads, *module.buffers()])
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-10, atol=1e-10)


def test_network_exports_with_dynamic_batch_and_size():
    model = small(backend="reference")
    sides = {i: torch.export.Dim(name, min=64, max=2048) for i, name in ((2, "h"), (3, "w"))}
    shapes = {"x": {0: torch.export.Dim("b", max=64), **sides}}
    exported = torch.export.export(model, (images(64, 96),), dynamic_shapes=shapes).module()
    for shape in ((97, 160, 3), (128, 64, 1)):
        x = images(*shape)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_changes_no_output_and_no_gradient():
    x = images()
    results = []
    for enable in (False, True):
        model = small(drop_path_rate=0.3, attn_drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.stages[2].blocks[1].position.register_forward_hook(lambda *a, c=calls: c.append(1))
        torch.manual_seed(0)
        out = model(x)
        out.square().sum().backward()
        assert len(calls) == (2 if enable else 1)
        results.append([out, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)
