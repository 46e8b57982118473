"""Checkpoints: parity of the public layouts, loading into networks, and our own format."""

import argparse
import hashlib
import json
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoint_files import MICRO, assert_same, micro, micro_state, refused, write_pth
from public_layout import (
    DATA,
    parity_images,
    parity_logits,
    public_shapes,
    public_state_dict,
    public_weights,
    write_pdparams,
)
from safetensors import safe_open

import dsnet
from dsnet.checkpoint import convert_checkpoint, read_checkpoint, save_checkpoint
from dsnet.checkpoint.layout import Architecture, from_public
from dsnet.commands import convert
from dsnet.variants import VARIANTS, Variant

PUBLIC = (8, 4, 2, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The known tiny network as each kind of file, by kind."""
    folder = tmp_path_factory.mktemp("tiny")
    files = {kind: folder / f"tiny.{kind}" for kind in ("pth", "pdparams", "safetensors")}
    torch.save({"model": public_state_dict()}, files["pth"])
    write_pdparams(files["pdparams"], public_weights())
    convert_checkpoint(files["pth"], files["safetensors"])
    return files


# Public layouts


def test_public_shapes_are_those_of_the_published_file():
    published = json.loads((DATA / "public_checkpoint_layout.json").read_text())["tiny"]
    shapes = public_shapes(VARIANTS["dsnet_tiny"])
    assert {name: list(shape) for name, shape in shapes.items()} == published


@pytest.mark.parametrize("kind", ["pth", "pdparams", "safetensors"])
def test_logits_match_the_public_implementation(tiny, kind):
    model = dsnet.load_checkpoint("dsnet_tiny", tiny[kind]).eval()
    assert model.global_reduction == PUBLIC
    images, logits = parity_images(), parity_logits()
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(model.double()(images.double()), logits, rtol=0, atol=1e-9)


def test_create_model_takes_weights_and_their_reduction(tiny):
    model = dsnet.create_model("dsnet_tiny", weights=tiny["pth"])
    assert model.global_reduction == PUBLIC
    assert_same(model, dsnet.load_checkpoint("dsnet_tiny", tiny["pdparams"]).state_dict())
    chosen = dsnet.create_model("dsnet_tiny", weights=tiny["pth"], global_reduction=(8, 4, 2, 1))
    assert chosen.stages[3].blocks[0].global_reduction == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_recognised_from_public_shapes(name):
    shapes = public_shapes(VARIANTS[name], num_classes=10)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    architecture = Architecture.of(from_public(tensors, paddle=False))
    assert architecture.variant == name
    assert architecture.num_classes == 10
    assert architecture.alpha == 0.5


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_paddle_pickle_protocols(tmp_path, protocol):
    path = write_pdparams(tmp_path / "a", public_weights(MICRO, 3), protocol)
    file = read_checkpoint(path)
    assert (file.format, file.layout, file.global_reduction) == ("Paddle", "public", PUBLIC)
    expected = micro()
    dsnet.load_checkpoint(expected, write_pth(tmp_path / "b", micro_state()))
    assert_same(dsnet.load_checkpoint(micro(), path), expected.state_dict())


def test_paddle_fortran_order_and_bfloat16(tmp_path):
    weights = dict(public_weights(MICRO, 3))
    expected = micro()
    dsnet.load_checkpoint(expected, write_pdparams(tmp_path / "a", weights))
    # The writer transposes the head's matrix to C order; here it stays Fortran-ordered.
    arrays = pickle.loads((tmp_path / "a").read_bytes())
    arrays["head.weight"] = np.asfortranarray(arrays["head.weight"])
    bits = torch.from_numpy(arrays["norm.weight"]).bfloat16().view(torch.int16).numpy()
    arrays["norm.weight"] = bits.view(np.uint16)
    (tmp_path / "b").write_bytes(pickle.dumps(OrderedDict(arrays), protocol=2))
    model = dsnet.load_checkpoint(micro(), tmp_path / "b")
    torch.testing.assert_close(model.head.weight, expected.head.weight, rtol=0, atol=0)
    assert torch.equal(model.norm.weight, expected.norm.weight.bfloat16().float())


CONTAINERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "OrderedDict": lambda state: OrderedDict(state),
    "parameters": lambda state: {
        name: torch.nn.Parameter(value) if value.is_floating_point() else value
        for name, value in state.items()
    },
    "no counts": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_torch_containers(tmp_path, container, legacy):
    path = write_pth(
        tmp_path / "a.bin",
        CONTAINERS[container](micro_state()),
        _use_new_zipfile_serialization=not legacy,
    )
    assert read_checkpoint(path).format == ("legacy PyTorch" if legacy else "PyTorch")
    model = dsnet.load_checkpoint(micro(), path)
    expected = from_public(micro_state(), paddle=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_own_names_in_a_torch_file_keep_the_reduction(tmp_path):
    source = micro()
    path = write_pth(tmp_path / "a", source.state_dict())
    model = dsnet.load_checkpoint(micro(global_reduction=(4, 2, 1, 1)), path)
    assert model.global_reduction == (4, 2, 1, 1)
    assert_same(model, source.state_dict())


def test_model_ema_chooses_the_averaged_weights(tmp_path):
    averaged = {name: tensor * 2 for name, tensor in micro_state().items()}
    path = write_pth(tmp_path / "a", {"model": micro_state(), "model_ema": averaged})
    plain = dsnet.load_checkpoint(micro(), path)
    ema = dsnet.load_checkpoint(micro(), path, model_ema=True)
    assert torch.equal(ema.head.weight, 2 * plain.head.weight)


@pytest.mark.parametrize("kind", ["pth", "pdparams", "safetensors"])
def test_model_ema_that_is_not_there(tiny, kind):
    with pytest.raises(dsnet.CheckpointError, match="expected averaged weights under 'model_ema'"):
        dsnet.load_checkpoint("dsnet_tiny", tiny[kind], model_ema=True)


# Into a model


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(tmp_path, stored, dtype):
    # Casting everything, counts included, is how half-precision checkpoints are commonly made.
    state = {name: tensor.to(stored) for name, tensor in micro_state().items()}
    model = micro().to(dtype)
    dsnet.load_checkpoint(model, write_pth(tmp_path / "a", state))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(model.head.weight, state["head.weight"].to(dtype))


def test_a_channels_last_model_keeps_its_layout(tiny):
    model = dsnet.create_model("dsnet_tiny")
    dsnet.load_checkpoint(model, tiny["pth"])
    weight = model.stages[1].embed.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, public_state_dict()["patch_embed2.proj.weight"])


def test_a_public_checkpoint_sets_the_reduction_of_a_model(tmp_path):
    path = write_pth(tmp_path / "a", micro_state())
    model = dsnet.load_checkpoint(micro(), path)
    assert model.global_reduction == PUBLIC
    assert [stage.blocks[0].global_reduction for stage in model.stages] == list(PUBLIC)
    other = dsnet.load_checkpoint(micro(), path, global_reduction=[8, 4, 2, 1])
    assert other.global_reduction == (8, 4, 2, 1)
    assert other.stages[3].blocks[0].global_reduction == 1


def test_features_take_what_they_need(tiny):
    full = dsnet.load_checkpoint("dsnet_tiny", tiny["pth"]).eval()
    by_name = dsnet.load_checkpoint(
        "dsnet_tiny", tiny["safetensors"], features_only=True, out_indices=(0, 2)
    ).eval()
    given = dsnet.create_model("dsnet_tiny", features_only=True, out_indices=(0, 2)).eval()
    dsnet.load_checkpoint(given, tiny["pth"])
    image = parity_images()[:1, :, :64, :64]
    with torch.no_grad():
        expected = full.forward_intermediates(image, [0, 2], intermediates_only=True)
        for model in (by_name, given):
            assert model.global_reduction == PUBLIC
            torch.testing.assert_close(model(image), expected, rtol=0, atol=0)


def test_features_of_a_network_with_other_classes(tmp_path):
    path = tmp_path / "a"
    save_checkpoint(dsnet.create_model("dsnet_tiny", num_classes=5), path)
    for head in (True, False):
        model = dsnet.load_checkpoint("dsnet_tiny", path, head=head, features_only=True)
        assert model.num_classes == 0
    with pytest.raises(ValueError, match="num_classes: only without features_only=True, got 7"):
        dsnet.load_checkpoint("dsnet_tiny", path, features_only=True, num_classes=7)


def test_head_false_loads_the_rest(tmp_path):
    path = write_pth(tmp_path / "a", micro_state())
    model = micro(num_classes=7)
    head = model.head.weight.clone()
    with pytest.raises(dsnet.CheckpointError, match="3 in the file, 7 in the model") as info:
        dsnet.load_checkpoint(model, path)
    assert "load_checkpoint(..., head=False)" in str(info.value)
    assert "head.weight (expected (7, 64), got (3, 64))" in str(info.value)
    dsnet.load_checkpoint(model, path, head=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, micro_state()["norm.weight"])


def test_head_false_by_name_builds_the_wanted_classifier(tiny):
    bare = dsnet.load_checkpoint("dsnet_tiny", tiny["pth"], head=False)
    assert isinstance(bare.head, torch.nn.Identity)
    own = dsnet.load_checkpoint("dsnet_tiny", tiny["pth"], head=False, num_classes=5)
    assert own.head.weight.shape == (5, 512)
    with pytest.raises(dsnet.CheckpointError, match="loads all but the classifier"):
        dsnet.load_checkpoint("dsnet_tiny", tiny["pth"], num_classes=5)


def test_a_file_without_head_needs_head_false(tmp_path):
    save_checkpoint(micro(num_classes=0), tmp_path / "a")
    refused(tmp_path / "a", r"missing: 2 \(head.weight, head.bias\); .*head=False")
    dsnet.load_checkpoint(micro(), tmp_path / "a", head=False)


def test_one_error_lists_missing_unexpected_and_misshapen(tmp_path):
    state = micro_state()
    del state["blocks1.0.conv1.weight"]
    state["extra.weight"] = torch.ones(2)
    state["norm.bias"] = torch.ones(65)
    message = refused(write_pth(tmp_path / "a", state), "does not fit")
    assert "missing: 1 (stages.0.blocks.0.split.weight)" in message
    assert "unexpected: 1 (extra.weight)" in message
    assert "misshapen: 1 (norm.bias (expected (64,), got (65,)))" in message


def test_long_lists_are_cut(tmp_path):
    state = micro_state() | {f"extra{i}\n": torch.ones(1) for i in range(20)}
    message = refused(write_pth(tmp_path / "a", state), r"unexpected: 20 \(.*and 15 more\)")
    assert message.count("extra") == 5


def test_differing_architectures_are_named(tmp_path):
    path = tmp_path / "a"
    save_checkpoint(micro(alpha=0.25, in_chans=4), path)
    message = refused(path, "alpha 0.25 in the file, 0.5 in the model")
    assert "in_chans 4 in the file, 3 in the model" in message


def test_another_variant_is_refused(tiny):
    expected = "expected dsnet_small, got dsnet_tiny with 2, 2, 4, 1 blocks per stage"
    loads = [
        lambda: dsnet.load_checkpoint("dsnet_small", tiny["pth"]),
        lambda: dsnet.create_model("dsnet_small", weights=tiny["pth"]),
        lambda: dsnet.load_checkpoint(dsnet.create_model("dsnet_small"), tiny["pth"]),
    ]
    for load in loads:
        with pytest.raises(dsnet.CheckpointError, match=expected):
            load()


def test_equal_shapes_with_other_heads_are_refused(tmp_path):
    heads = Variant(MICRO.depths, MICRO.embed_dims, num_heads=(2, 4, 4, 4))
    save_checkpoint(dsnet.DSNet(heads, num_classes=3), tmp_path / "a")
    refused(tmp_path / "a", r"expected a network of \(1, 2, 5, 8\) heads, got \(2, 4, 4, 4\)")


def test_bad_arguments(tiny, tmp_path):
    path = tiny["pth"]
    with pytest.raises(ValueError, match="name: expected one of dsnet_tiny"):
        dsnet.load_checkpoint("resnet50", path)
    with pytest.raises(TypeError, match="model_or_name: expected a DSNet or a name, got Linear"):
        dsnet.load_checkpoint(torch.nn.Linear(1, 1), path)
    with pytest.raises(TypeError, match="drop_rate: only with a name"):
        dsnet.load_checkpoint(micro(), path, drop_rate=0.1)
    with pytest.raises(ValueError, match="global_reduction: expected 4 numbers"):
        dsnet.load_checkpoint(micro(), path, global_reduction=(8, 4))
    with pytest.raises(ValueError, match="got one on the meta device"):
        dsnet.create_model("dsnet_tiny", device="meta", weights=path)
    with pytest.raises(TypeError, match="model: expected a DSNet, got Linear"):
        save_checkpoint(torch.nn.Linear(1, 1), tmp_path / "a")


# Our own format


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.0, "global_reduction": (4, 4, 2, 1)},
        {"alpha": 0.25},
        {"alpha": 0.75, "co_attention_dim": (16, 32, 80, 128), "mlp_ratio": 2.7},
        {"alpha": 1.0, "num_classes": 0},
        {"alignment": False, "in_chans": 1, "num_classes": 7},
    ],
    ids=str,
)
def test_a_name_alone_rebuilds_the_saved_network(tmp_path, arguments):
    source = dsnet.create_model("dsnet_tiny", **arguments).eval()
    save_checkpoint(source, tmp_path / "a")
    model = dsnet.load_checkpoint("dsnet_tiny", tmp_path / "a").eval()
    assert_same(model, source.state_dict())
    assert model.global_reduction == source.global_reduction
    image = torch.randn(1, source.in_chans, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(image), source(image))


def test_convert_writes_metadata(tiny):
    with safe_open(tiny["safetensors"], framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "format_version": "1",
        "variant": "dsnet_tiny",
        "global_reduction": "[8, 4, 2, 2]",
        "num_heads": "[1, 2, 5, 8]",
        "source_sha256": hashlib.sha256(tiny["pth"].read_bytes()).hexdigest(),
    }


def run_convert(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(argument) for argument in arguments]))


def test_convert_command(tiny, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert run_convert(tiny["pdparams"], target) == 0
    out = capsys.readouterr().out
    assert "Paddle format, public layout, dsnet_tiny, 1000 classes, alpha 0.5" in out
    assert "global_reduction: [8, 4, 2, 2]" in out
    assert hashlib.sha256(tiny["pdparams"].read_bytes()).hexdigest() in out
    with pytest.raises(FileExistsError, match="--force replaces it"):
        run_convert(tiny["pdparams"], target)
    assert run_convert(tiny["pdparams"], target, "--force") == 0
    with pytest.raises(dsnet.CheckpointError, match="model_ema"):
        run_convert(tiny["pdparams"], target, "--force", "--model-ema")
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_convert_refuses_an_incomplete_network(tmp_path):
    state = public_state_dict()
    del state["norm.weight"]
    path = write_pth(tmp_path / "a", state)
    with pytest.raises(dsnet.CheckpointError, match=r"missing: 1 \(norm.weight\)"):
        convert_checkpoint(path, tmp_path / "b")
    write_pth(path, micro_state())
    with pytest.raises(dsnet.CheckpointError, match="got another network with 1, 1, 1, 1 blocks"):
        convert_checkpoint(path, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_saving_never_leaves_half_a_file(tmp_path, monkeypatch):
    target = tmp_path / "a"
    save_checkpoint(micro(), target)
    content = target.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        save_checkpoint(micro(), target)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(micro(), target, overwrite=True)
    assert target.read_bytes() == content
    assert os.listdir(tmp_path) == ["a"]


def test_saved_files_have_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(micro(), tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_saving_where_no_file_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        save_checkpoint(micro(), tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        save_checkpoint(micro(), tmp_path, overwrite=True)
