"""The network: construction, shapes, and the interface of a classifier and a backbone."""

import re

import pytest
import torch
from small_network import SMALL, images, small
from torch import nn

import dsnet
from dsnet.model import DSNet, DSNetFeatures
from dsnet.variants import VARIANTS, Variant

PARAMETERS = {"dsnet_tiny": 10_534_312, "dsnet_small": 23_004_552, "dsnet_base": 49_343_752}


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


# Construction


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_networks_have_the_published_number_of_parameters(name):
    model = dsnet.create_model(name, device="meta")
    assert parameter_count(model) == PARAMETERS[name]
    assert [len(stage.blocks) for stage in model.stages] == list(VARIANTS[name].depths)
    other = dsnet.create_model(name, device="meta", global_reduction=(8, 4, 2, 2))
    assert parameter_count(other) == PARAMETERS[name]


def test_list_models_names_what_create_model_takes():
    assert dsnet.list_models() == list(PARAMETERS)


def test_create_model_passes_every_option_on():
    model = dsnet.create_model(
        "dsnet_tiny",
        device="meta",
        dtype=torch.bfloat16,
        num_classes=5,
        in_chans=4,
        alpha=0.25,
        alignment=False,
        global_reduction=(8, 4, 2, 2),
        drop_path_rate=0.2,
        attn_drop_rate=0.1,
        drop_rate=0.3,
        mlp_ratio=2.0,
        backend="reference",
    )
    block = model.stages[3].blocks[0]
    assert model.head.out_features == 5
    assert model.stages[0].embed.in_channels == 4
    assert block.global_dim == 128
    assert block.co_attention is None
    assert model.global_reduction == (8, 4, 2, 2)
    assert block.global_reduction == 2
    assert block.drop_path.p == 0.2
    assert block.attention.dropout == 0.1
    assert model.head_drop.p == 0.3
    assert block.mlp.fc1.out_features == 1024
    assert block.backend == "reference"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_co_attention_width_is_given_per_stage():
    model = small(co_attention_dim=(2, 4, 6, 8))
    widths = [stage.blocks[0].co_attention.local_proj.in_features for stage in model.stages]
    assert widths == [2, 4, 6, 8]
    assert model(images()).isfinite().all()


def test_drop_path_rises_linearly_over_all_blocks():
    model = dsnet.create_model("dsnet_small", device="meta", drop_path_rate=0.34)
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(18)])


def test_new_weights_are_truncated_normal_and_new_biases_zero():
    torch.manual_seed(0)
    model = dsnet.create_model("dsnet_tiny")
    # A normal cut at two standard deviations keeps 0.88 of its own.
    for layer, std in (
        (model.head, 0.02),
        (model.stages[3].blocks[0].fuse, 0.02),
        (model.stages[3].blocks[0].position.conv, 0.02),
        (model.stages[0].embed, (3 * 4 * 4) ** -0.5),
        (model.stages[3].embed, (320 * 2 * 2) ** -0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.05)
        assert layer.weight.abs().max().item() <= 2.001 * std
    biases = [bias for name, bias in model.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_a_new_network_keeps_the_scale_of_its_input():
    torch.manual_seed(0)
    model = DSNet(Variant(depths=(2, 2, 12, 2)), num_classes=0).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(images(dtype=torch.float32), intermediates_only=True)
    for output in maps:
        assert 0.3 < output.std().item() < 3.0


# Shapes


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (97, 160), (224, 224)])
def test_any_image_of_at_least_32_pixels_works(size):
    torch.manual_seed(0)
    model = dsnet.create_model("dsnet_tiny", num_classes=10).eval()
    with torch.no_grad():
        features, maps = model.forward_intermediates(images(*size, dtype=torch.float32))
        logits = model.forward_head(features)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    shapes = []
    for dim, stride in zip((64, 128, 320, 512), (4, 2, 2, 2), strict=True):
        size = tuple(side // stride for side in size)
        shapes.append((2, dim, *size))
    assert [tuple(m.shape) for m in maps] == shapes
    assert tuple(features.shape) == shapes[-1]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_any_number_of_channels(channels):
    model = small(in_chans=channels)
    assert model(images(channels=channels)).shape == (2, 7)
    with pytest.raises(ValueError, match=rf"x: expected \(B, {channels}, H, W\)"):
        model(images(channels=3))


@pytest.mark.parametrize("shape", [(2, 3, 31, 64), (2, 3, 64, 31), (3, 64, 64), (2, 1, 64, 64)])
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_wrong_images_are_refused_by_shape(method, shape):
    message = f"x: expected (B, 3, H, W) with H and W at least 32, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(small(), method)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alignment", [True, False])
def test_variants_of_the_paper_train(alpha, alignment):
    model = small(alpha=alpha, alignment=alignment).train()
    model(images()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_forward_is_the_chain_of_its_parts():
    model, x = small(drop_rate=0.5), images()
    y = x
    for stage in model.stages:
        y = stage.embed(y)
        for block in stage.blocks:
            y = block(y)
    expected = model.head(model.norm(y).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# The interface of a classifier and a backbone


def test_head_follows_features_and_pre_logits_stop_before_it():
    model, x = small(), images()
    features = model.forward_features(x)
    assert features.shape == (2, 64, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(model.forward_head(features), model.head(pooled))
    assert torch.equal(model(x), model.forward_head(features))


def test_head_dropout_acts_in_training_only():
    model, features = small(drop_rate=0.5), torch.ones(1, 64, 2, 2).double()
    assert model.forward_head(features, pre_logits=True).eq(1).all()
    torch.manual_seed(0)
    assert set(model.train().forward_head(features, pre_logits=True).unique().tolist()) == {0, 2}


def test_intermediates_are_the_outputs_of_the_stages():
    model, x = small(), images()
    features, maps = model.forward_intermediates(x)
    y = x
    for stage, got in zip(model.stages, maps, strict=True):
        y = stage(y)
        assert torch.equal(got, y)
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(features, model.norm(maps[-1]))


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1, 3], [1, 3]), ([-4, -1], [0, 3]), ((2,), [2])],
)
def test_intermediates_are_chosen_by_index(indices, expected):
    model, x = small(), images()
    everything = model.forward_intermediates(x, intermediates_only=True)
    chosen = model.forward_intermediates(x, indices, intermediates_only=True)
    assert len(chosen) == len(expected)
    for got, stage in zip(chosen, expected, strict=True):
        assert torch.equal(got, everything[stage])


def test_norm_applies_to_the_last_stage_alone():
    model, x = small(), images()
    plain = model.forward_intermediates(x, intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], normed[:3], strict=True))
    assert torch.equal(normed[3], model.norm(plain[3]))


def test_stop_early_runs_no_later_stage():
    model, x = small(), images()
    ran = []
    for i, stage in enumerate(model.stages):
        stage.embed.register_forward_hook(lambda *args, i=i: ran.append(i))
    features, maps = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert ran == [0, 1]
    assert torch.equal(features, maps[-1])
    ran.clear()
    model.forward_intermediates(x, [0, 1])
    assert ran == [0, 1, 2, 3]


def test_streams_come_with_each_stage_and_lead_to_its_output():
    model, x = small(), images(64, 96)
    outputs = model.forward_intermediates(x, intermediates_only=True)
    triples = model.forward_intermediates(x, streams=True, intermediates_only=True)
    for i, (out, local, global_) in enumerate(triples):
        assert torch.equal(out, outputs[i])
        half = SMALL.embed_dims[i] // 2
        assert local.shape == (2, half, *out.shape[2:])
        assert global_.shape == (2, half, 2, 3)
    block, (out, local, global_) = model.stages[0].blocks[0], triples[0]
    x1 = block.position(model.stages[0].embed(x))
    upsampled = nn.functional.interpolate(global_, size=local.shape[2:], mode="bilinear")
    x2 = x1 + block.fuse(torch.cat([local, upsampled], 1))
    torch.testing.assert_close(block.mlp(x2, None), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"indices": [4]}, "indices: expected stages between -4 and 3, got [4]"),
        ({"indices": []}, "indices: expected stages between -4 and 3, got []"),
        ({"indices": 5}, "indices: expected a count between 1 and 4, got 5"),
        ({"indices": 0}, "indices: expected a count between 1 and 4, got 0"),
        ({"output_fmt": "NLC"}, "output_fmt: expected 'NCHW', got 'NLC'"),
    ],
)
def test_wrong_requests_for_intermediates_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small().forward_intermediates(images(), **kwargs)


def test_pruning_keeps_what_the_chosen_stages_need():
    model, x = small(), images()
    expected = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert len(model.stages) == 3
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    got = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_pruning_may_keep_norm_and_head():
    model, x = small(), images()
    expected = model(x)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("out_indices", [None, (1, 2, 3), (0,), (-1, 0), 2])
def test_features_only_returns_the_maps_that_its_info_describes(out_indices):
    backbone, whole = small(DSNetFeatures, out_indices=out_indices), small()
    missing = backbone.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert not missing
    x = images()
    maps = backbone(x)
    expected = whole.forward_intermediates(x, out_indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    info = backbone.feature_info
    assert info.channels() == [m.shape[1] for m in maps]
    assert info.reduction() == [64 // m.shape[2] for m in maps]
    modules = dict(backbone.named_modules())
    assert all(name in modules for name in info.module_name())
    assert info.get_dicts()[-1]["num_chs"] == maps[-1].shape[1]


def test_create_model_builds_a_backbone():
    model = dsnet.create_model("dsnet_tiny", features_only=True, out_indices=(1, 2, 3)).eval()
    assert model.feature_info.reduction() == [8, 16, 32]
    assert model.feature_info.channels() == [128, 320, 512]
    with torch.no_grad():
        maps = model(images(dtype=torch.float32))
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 8, 8), (320, 4, 4), (512, 2, 2)]


def test_feature_info_of_the_classifier():
    info = small().feature_info
    assert [entry["reduction"] for entry in info] == [4, 8, 16, 32]
    assert [entry["num_chs"] for entry in info] == list(SMALL.embed_dims)


def test_classifier_can_be_replaced_and_removed():
    model, x = small(), images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.head.weight.dtype == torch.float64
    assert not model.head.bias.any()
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(4, global_pool="avg")
    assert model(x).shape == (2, 4)


def test_pooling_can_be_left_out():
    model, x = small(), images()
    features = model.forward_features(x)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match="num_classes: expected 0 without global pooling, got 5"):
        model.reset_classifier(5)
    model.reset_classifier(5, global_pool="avg")
    assert model(x).shape == (2, 5)
    unpooled = DSNet(SMALL, num_classes=0, global_pool="").double().eval()
    assert unpooled(x).shape == features.shape


def test_no_parameter_beyond_norms_and_biases_is_free_of_weight_decay():
    assert small().no_weight_decay() == set()


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_every_parameter_from_stem_to_norm(coarse):
    model = small()
    matcher = model.group_matcher(coarse)
    rules = [(matcher["stem"], None), *matcher["blocks"]]

    def group(name):
        for position, (pattern, suffix) in enumerate(rules):
            found = re.match(pattern, name)
            if found:
                return (position > 0, *map(int, found.groups()), *(suffix or ()))
        return (2,)

    groups = [group(name) for name, _ in model.named_parameters()]
    assert groups == sorted(groups)
    assert [n for n, _ in model.named_parameters() if group(n) == (2,)] == [
        "head.weight",
        "head.bias",
    ]
    stages_and_blocks = {g[1:] for g in groups if g[0] == 1 and g[1] < 4}
    per_block = {(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)}
    assert stages_and_blocks == ({(0,), (1,), (2,), (3,)} if coarse else per_block)


# Wrong arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 2}, "alpha: expected 0 <= alpha <= 1, got 2"),
        ({"alpha": 0.3}, "alpha: expected round(alpha * 320) to be a multiple of 5 heads"),
        ({"global_reduction": (8, 4, 2)}, "global_reduction: expected 4 numbers of at least 1"),
        ({"global_reduction": (8, 4, 2, 0)}, "global_reduction: expected 4 numbers of at least 1"),
        ({"co_attention_dim": (1, 2)}, "co_attention_dim: expected 4 numbers of at least 1"),
        ({"num_classes": -1}, "num_classes: expected at least 0, got -1"),
        ({"in_chans": 0}, "in_chans: expected at least 1, got 0"),
        ({"global_pool": "max"}, "global_pool: expected 'avg' or '', got 'max'"),
        ({"global_reduction": []}, "global_reduction: expected 4 numbers of at least 1, got []"),
        ({"global_reduction": 8}, "global_reduction: expected 4 numbers of at least 1, got 8"),
        ({"global_reduction": "8421"}, "global_reduction: expected 4 numbers"),
        ({"global_reduction": (8, 4, 2, 1.0)}, "global_reduction: expected 4 numbers"),
        ({"co_attention_dim": 32}, "co_attention_dim: expected 4 numbers of at least 1, got 32"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: expected 0 <= drop_path_rate < 1, got 1.0"),
        ({"attn_drop_rate": -1}, "attn_drop_rate: expected 0 <= attn_drop_rate < 1, got -1"),
        ({"drop_rate": 1.5}, "drop_rate: expected 0 <= drop_rate < 1, got 1.5"),
        ({"mlp_ratio": 0.001}, "mlp_ratio: expected at least one hidden channel at width 64, got"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio: expected at least one hidden channel"),
        ({"backend": "gpu"}, "backend: expected one or more of auto, "),
        ({"backend": ["cpu", "gpu"]}, "backend: expected one or more of auto, "),
        ({"model_ema": True}, "model_ema: only with weights"),
        ({"out_indices": (0,)}, "out_indices: only with features_only=True"),
        ({"features_only": True, "out_indices": (0, 4)}, "out_indices: expected stages between"),
        ({"features_only": True, "out_indices": 5}, "out_indices: expected a count between 1"),
        ({"features_only": True, "num_classes": 10}, "num_classes: only without features_only"),
    ],
)
def test_create_model_refuses(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsnet.create_model("dsnet_tiny", device="meta", **kwargs)


def test_unknown_name_lists_the_known_ones():
    message = "name: expected one of dsnet_tiny, dsnet_small, dsnet_base, got 'resnet50'"
    with pytest.raises(ValueError, match=re.escape(message)):
        dsnet.create_model("resnet50")


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="img_size"):
        dsnet.create_model("dsnet_tiny", device="meta", img_size=224)
