"""Counted multiply-accumulates against the paper's equations, and the published figures."""

import pytest

import dsnet
from dsnet.macs import count_macs
from dsnet.variants import PAPER_REDUCTION, PUBLIC_REDUCTION, VARIANTS


def stages(name, reduction, size):
    """(blocks, C, C of the stage before, kernel, N, M) of each stage."""
    variant = VARIANTS[name]
    before, grid = 3, size
    for i, (depth, width) in enumerate(zip(variant.depths, variant.embed_dims, strict=True)):
        kernel = 4 if i == 0 else 2
        grid //= kernel
        yield depth, width, before, kernel, grid**2, max(1, grid // reduction[i]) ** 2
        before = width


def macs_by_hand(name, reduction, size=224):
    total = 512 * 1000
    for depth, c, before, kernel, n, m in stages(name, reduction, size):
        half = c // 2
        block = 9 * n * c + n * c * c + 9 * n * half  # position, split, local convolution
        block += m * half * 3 * half + 2 * m * m * half  # self-attention
        block += (n + m) * half * 3 * half + 4 * n * m * half + (n + m) * half * half  # alignment
        block += n * c * c + 8 * n * c * c  # fusion, MLP
        total += n * before * c * kernel**2 + depth * block
    return total


@pytest.mark.parametrize("reduction", [PAPER_REDUCTION, PUBLIC_REDUCTION])
@pytest.mark.parametrize("name", VARIANTS)
def test_counts_what_the_equations_say(name, reduction):
    model = dsnet.create_model(name, global_reduction=reduction, device="meta").eval()
    assert count_macs(model) == macs_by_hand(name, reduction)


def test_follows_the_image_size():
    model = dsnet.create_model("dsnet_tiny", device="meta").eval()
    assert count_macs(model, 320) == macs_by_hand("dsnet_tiny", PAPER_REDUCTION, 320)


def test_leaves_a_real_model_as_it_was():
    model = dsnet.create_model("dsnet_tiny", in_chans=1, num_classes=0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fewer = 2 * 56 * 56 * 64 * 16 + 512 * 1000
    assert count_macs(model) == macs_by_hand("dsnet_tiny", PAPER_REDUCTION) - fewer
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "published"), [("dsnet_tiny", 1.840), ("dsnet_small", 3.561), ("dsnet_base", 8.319)]
)
def test_published_figures_also_count_normalisation_and_interpolation(name, published):
    # Per element: BatchNorm 2, LayerNorm 5, bilinear output 4.
    extra = 2 * 49 * 512
    for depth, c, _, _, n, m in stages(name, PUBLIC_REDUCTION, 224):
        extra += depth * (2 * 3 * n * c + 5 * m * c + 4 * (n + m) * c // 2)
    total = (macs_by_hand(name, PUBLIC_REDUCTION) + extra) / 1e9
    assert total == pytest.approx(published, abs=5e-4)
