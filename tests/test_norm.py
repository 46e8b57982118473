"""BatchNorm as scale and shift, against torch's own modules, in one process and in two."""

import copy
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing, nn

from dsnet.norm import batch_norm_affine

CHANNELS = 5


def make_norm(dtype=torch.float64, cls=nn.BatchNorm2d, **kwargs):
    norm = cls(CHANNELS, **kwargs).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(CHANNELS, generator=generator)
            tensor.copy_(1 + 0.5 * noise.abs() if name == "running_var" else noise)
    return norm


def batch(dtype=torch.float64, size=4, height=3, width=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, CHANNELS, height, width, generator=generator, dtype=torch.float64)
    return (3 * x + torch.arange(CHANNELS).view(-1, 1, 1)).to(dtype)


def apply(norm, x):
    scale, shift = batch_norm_affine(norm, x)
    assert scale.shape == shift.shape == (CHANNELS,)
    return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def assert_same_buffers(norm, expected, **tolerance):
    for (name, got), (_, want) in zip(norm.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


VARIANTS = {
    "default": {},
    "large eps": {"eps": 0.1},
    "momentum 0.3": {"momentum": 0.3},
    "momentum 0": {"momentum": 0.0},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_equals_batch_norm(training, kwargs):
    ours = make_norm(**kwargs).train(training)
    torchs, x = copy.deepcopy(ours), batch()
    for step in range(3):
        torch.testing.assert_close(apply(ours, x + step), torchs(x + step))
    assert_same_buffers(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_batch_norm(training):
    ours = make_norm().train(training)
    torchs = copy.deepcopy(ours)
    direction = batch(size=4).cos()
    grads = []
    for forward, norm in ((apply, ours), (lambda norm, x: norm(x), torchs)):
        x = batch().requires_grad_()
        out = (forward(norm, x) * direction).sum()
        grads.append(torch.autograd.grad(out, (x, norm.weight, norm.bias)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class Affine(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return batch_norm_affine(self.norm, x)


def test_gradcheck_through_the_batch_statistics():
    module = Affine(make_norm().train())

    def forward(x, weight, bias):
        parameters = {"norm.weight": weight, "norm.bias": bias}
        return torch.func.functional_call(module, parameters, (x,))

    x = batch(size=2, height=2, width=2).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, module.norm.weight, module.norm.bias))


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_low_precision_statistics_are_taken_in_float32(training, norm_dtype):
    norm = make_norm(norm_dtype).train(training)
    exact = copy.deepcopy(norm).double()
    x = batch(torch.bfloat16, size=64)
    scale, shift = batch_norm_affine(norm, x)
    assert scale.dtype == shift.dtype == torch.float32
    expected_scale, expected_shift = batch_norm_affine(exact, x.double())
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift.double(), expected_shift, rtol=1e-5, atol=1e-5)
    resolution = torch.finfo(norm_dtype).eps
    for name in ("running_mean", "running_var"):
        got, want = getattr(norm, name), getattr(exact, name)
        assert got.dtype == norm_dtype
        torch.testing.assert_close(got.double(), want, rtol=2 * resolution, atol=2 * resolution)


def test_evaluation_leaves_the_statistics_alone():
    norm = make_norm().eval()
    before = copy.deepcopy(norm)
    batch_norm_affine(norm, batch())
    assert_same_buffers(norm, before, rtol=0, atol=0)


def test_statistics_do_not_depend_on_the_memory_format():
    x = batch()
    nchw = batch_norm_affine(make_norm().train(), x)
    nhwc = batch_norm_affine(make_norm().train(), x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(nchw, nhwc, rtol=1e-12, atol=1e-12)


def test_variance_survives_a_mean_far_from_zero():
    norm = nn.BatchNorm2d(CHANNELS).train()
    x = batch(torch.float32) + 1e4
    scale, _ = batch_norm_affine(norm, x)
    expected = (x.double().var((0, 2, 3), correction=0) + norm.eps).rsqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=0)


# Frozen


class FrozenBatchNorm(nn.Module):
    """Statistics and affine as buffers, as in torchvision and timm."""

    def __init__(self, norm, act=None):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.eps = norm.eps
        self.act = nn.Identity() if act is None else act


@pytest.mark.parametrize("training", [False, True])
def test_frozen_batch_norm_keeps_its_running_statistics(training):
    norm = make_norm(eps=1e-3).eval()
    frozen = FrozenBatchNorm(norm).train(training)
    before = copy.deepcopy(frozen)
    torch.testing.assert_close(apply(frozen, batch()), norm(batch()))
    assert_same_buffers(frozen, before, rtol=0, atol=0)


def test_refuses_what_only_resembles_a_frozen_batch_norm():
    unfrozen, without_affine = FrozenBatchNorm(make_norm()), FrozenBatchNorm(make_norm())
    unfrozen.momentum = 0.1
    without_affine.weight = None
    activated = FrozenBatchNorm(make_norm(), act=nn.ReLU())
    for module in (unfrozen, without_affine, activated):
        with pytest.raises(TypeError, match=r"norm: expected .*, got FrozenBatchNorm"):
            batch_norm_affine(module, batch())


# Errors


@pytest.mark.parametrize("module", [nn.BatchNorm1d(CHANNELS), nn.GroupNorm(1, CHANNELS)])
def test_refuses_another_module(module):
    expected = f"norm: expected BatchNorm2d or SyncBatchNorm, .*, got {type(module).__name__}"
    with pytest.raises(TypeError, match=expected):
        batch_norm_affine(module, batch())


def test_refuses_a_single_value_per_channel_in_training():
    norm, x = make_norm().train(), batch(size=1, height=1, width=1)
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 5, 1, 1\)"):
        batch_norm_affine(norm, x)
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(apply(norm.eval(), x), norm(x))


# Several processes


def test_sync_batch_norm_in_one_process_is_batch_norm():
    ours, torchs = make_norm(cls=nn.SyncBatchNorm).train(), make_norm().train()
    torch.testing.assert_close(apply(ours, batch()), torchs(batch()))
    assert_same_buffers(ours, torchs)


SPLIT = (3, 1)
"""Images of each process: the shares differ, so that counts have to weigh the means."""


def sync_process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=len(SPLIT),
        timeout=timedelta(seconds=30),
    )
    norm = make_norm(cls=nn.SyncBatchNorm).train()
    x = batch().split(SPLIT)[rank].clone().requires_grad_()
    direction = batch().cos().split(SPLIT)[rank]
    out = apply(norm, x)
    grads = torch.autograd.grad((out * direction).sum(), (x, norm.weight, norm.bias))
    result = {"out": out.detach(), "grads": grads, "buffers": dict(norm.named_buffers())}
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_sync_batch_norm_over_two_processes_equals_the_whole_batch(tmp_path):
    multiprocessing.spawn(sync_process, args=(str(tmp_path),), nprocs=len(SPLIT))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SPLIT))]

    norm, x = make_norm().train(), batch().requires_grad_()
    out = norm(x)
    grads = torch.autograd.grad((out * batch().cos()).sum(), (x, norm.weight, norm.bias))
    torch.testing.assert_close(torch.cat([share["out"] for share in shares]), out.detach())
    torch.testing.assert_close(torch.cat([share["grads"][0] for share in shares]), grads[0])
    for i in (1, 2):
        torch.testing.assert_close(sum(share["grads"][i] for share in shares), grads[i])
    for share in shares:
        for name, expected in norm.named_buffers():
            torch.testing.assert_close(share["buffers"][name], expected)
