"""The networks in timm: registry, construction, features, optimizer groups, data configuration."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dsnet

NAMES = dsnet.list_models()


@pytest.fixture(scope="module")
def timm():
    module = pytest.importorskip("timm", reason="timm is not installed: pip install '.[timm]'")
    import dsnet.timm  # noqa: F401 - registers the names

    return module


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(dsnet.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Without timm


def test_importing_dsnet_leaves_the_extras_alone():
    extras = "{'timm', 'torchvision', 'PIL', 'matplotlib'}"
    done = run_python(f"import sys, dsnet; print({extras} & set(sys.modules))")
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_missing_timm_names_the_extra():
    done = run_python("import sys; sys.modules['timm'] = None; import dsnet.timm")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dsnet.timm needs timm")
    assert last.endswith("pip install 'dsnet-kernels[timm]'")


# Registry and construction


def test_all_networks_are_registered_without_pretrained_weights(timm):
    assert timm.list_models("dsnet_*") == sorted(NAMES)
    assert timm.list_models("dsnet_*", pretrained=True) == []
    assert all(timm.is_model(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_timm_builds_the_same_network(timm, name):
    model = timm.create_model(name, device="meta")
    own = dsnet.create_model(name, device="meta")
    assert isinstance(model, dsnet.DSNet)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in own.state_dict().items()}


def test_options_reach_the_network(timm):
    model = timm.create_model(
        "dsnet_tiny", num_classes=10, in_chans=1, drop_path_rate=0.1, drop_rate=0.2, alpha=0.25
    )
    assert model.stages[3].blocks[0].drop_path.p == pytest.approx(0.1)
    assert model.stages[3].blocks[0].global_dim == 128
    assert model.head_drop.p == 0.2
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_network_without_classifier_and_pooling(timm):
    pooled = timm.create_model("dsnet_tiny", num_classes=0).eval()
    unpooled = timm.create_model("dsnet_tiny", num_classes=0, global_pool="").eval()
    x = torch.zeros(1, 3, 64, 64)
    assert pooled(x).shape == (1, pooled.num_features)
    assert unpooled(x).shape == (1, 512, 2, 2)


def test_pretrained_is_refused(timm):
    with pytest.raises(ValueError, match="no pretrained weights of dsnet_tiny are distributed"):
        timm.create_model("dsnet_tiny", pretrained=True)


def test_checkpoint_path_reads_a_state_dict_of_the_network(timm, tmp_path):
    source = timm.create_model("dsnet_tiny", num_classes=3).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    model = timm.create_model("dsnet_tiny", num_classes=3, checkpoint_path=path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("features_only", [False, True])
def test_weights_reads_a_checkpoint_of_ours(timm, tmp_path, features_only):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from dsnet.checkpoint import save_checkpoint

    source = dsnet.create_model("dsnet_tiny").eval()
    path = tmp_path / "weights.safetensors"
    save_checkpoint(source, path)
    model = timm.create_model("dsnet_tiny", weights=path, features_only=features_only).eval()
    x = torch.randn(1, 3, 64, 64)
    got, expected = model(x), source(x)
    if features_only:
        got, expected = got[-1], source.forward_intermediates(x, intermediates_only=True)[-1]
    assert torch.equal(got, expected)


# Features


@pytest.mark.parametrize("out_indices", [None, (1, 2, 3), (0, -1), 2])
def test_features_only_returns_the_maps_that_its_info_describes(timm, out_indices):
    model = timm.create_model("dsnet_tiny", features_only=True, out_indices=out_indices).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 96))
    taken = range(4)[-out_indices:] if isinstance(out_indices, int) else out_indices or range(4)
    assert model.feature_info.channels() == [(64, 128, 320, 512)[i] for i in taken]
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [64 // m.shape[2] for m in maps]
    names = dict(model.model.named_modules())
    assert all(name in names for name in model.feature_info.module_name())


# Training scripts


def test_a_frozen_network_trains_with_its_running_statistics(timm):
    from timm.utils import freeze

    model = timm.create_model("dsnet_tiny", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    freeze(model)
    model.train()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_data_configuration_is_that_of_the_recipe(timm):
    model = timm.create_model("dsnet_tiny", device="meta")
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    # timm resizes the shorter side to this.
    assert math.floor(224 / config["crop_pct"]) == 248


def test_named_layers_of_the_configuration_exist(timm):
    model = timm.create_model("dsnet_tiny", device="meta")
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_follow_the_depth_of_the_network(timm, coarse):
    from timm.models import group_parameters

    model = timm.create_model("dsnet_tiny", device="meta")
    layers = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for layer in layers.values() for name in layer]
    assert names == [name for name, _ in model.named_parameters()]
    # Stem, then stages or blocks, the norm with the last of them, then the classifier.
    *_, last, classifier = layers.values()
    assert len(layers) == 1 + (4 if coarse else 9) + 1
    assert layers[0] == ["stages.0.embed.weight", "stages.0.embed.bias"]
    assert last[-2:] == ["norm.weight", "norm.bias"]
    assert all(name.startswith("stages.3.") for name in last[:-2])
    assert classifier == ["head.weight", "head.bias"]


def test_layer_decay_and_weight_decay_reach_the_right_parameters(timm):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("dsnet_tiny", device="meta")
    groups = param_groups_layer_decay(
        model,
        weight_decay=0.05,
        layer_decay=0.5,
        no_weight_decay_list=model.no_weight_decay(),
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.stages[0].embed.weight)] == 0.5**10
    assert scale[id(model.stages[2].blocks[3].fuse.weight)] == 0.5**2
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.0 if parameter.dim() == 1 else 0.05)


def test_timm_batch_norm_tools_find_every_norm(timm):
    model = timm.create_model("dsnet_tiny")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = [type(module) for module in converted.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 4 * 9 + 1
    assert kinds.count(nn.BatchNorm2d) == 0
