"""depthwise_conv3x3 in Triton: its tiles, and the refusals."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsnet_kernels
from dsnet_kernels import triton
from dsnet_kernels.triton import can_run

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
not_interpreted = pytest.mark.skipif(
    triton.INTERPRETED, reason="TRITON_INTERPRET=1 lets the CPU stand in for a GPU"
)


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "import dsnet_kernels as kernels\n"
        "kernels.depthwise_conv3x3(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))\n"
        "kernels.info()\n"
        "print(before, 'triton' in sys.modules)"
    )
    package = str(Path(dsnet_kernels.__file__).parent.parent)
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# Refusals


@not_interpreted
def test_a_tensor_on_the_cpu_is_refused():
    assert can_run(torch.zeros(1, 1, 1, 1)) == "x is on cpu, not on a GPU"


class OnGpu:
    """What ``can_run`` looks at of a tensor."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def get_device(self):
        return 0


@not_interpreted
@with_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.float32, "GPU 0 has compute capability 7.5; the kernels need 8.0 or newer"),
        ((8, 0), torch.float32, None),
        ((9, 0), torch.bfloat16, None),
        ((12, 0), torch.float16, None),
        (
            (9, 0),
            torch.float64,
            "x is torch.float64; the kernel computes in float32, bfloat16 and float16",
        ),
    ],
)
def test_capability_and_dtype(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert can_run(OnGpu(dtype)) == reason


def test_absence_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton, "REFUSAL", "triton is not installed")
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 1, 3, 3)
    with pytest.raises(dsnet_kernels.BackendUnavailable, match="triton: triton is not installed"):
        dsnet_kernels.depthwise_conv3x3(x, weight, backend="triton")
    assert "triton" not in dsnet_kernels.available_backends("depthwise_conv3x3")


def test_a_triton_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(triton, "devices", ("cpu",))
    monkeypatch.setattr(triton, "_import_refusal", triton._import_refusal.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    reason = can_run(torch.zeros(1, 1, 1, 1))
    assert reason is not None
    assert reason.startswith("triton does not import: ")


# Tiles


@with_triton
@pytest.mark.parametrize("channels", [1, 3, 17, 20, 32, 64, 160, 256])
@pytest.mark.parametrize(
    "rest", [(0, 7, 7), (1, 1, 1), (64, 56, 56), (256, 7, 7), (1, 200, 333), (2**20, 3, 2**20)]
)
def test_programs_cover_every_pixel_once(channels, rest):
    from dsnet_kernels.triton import depthwise_conv3x3 as kernels

    batch, height, width = rest
    shape = torch.Size((max(batch, 1), channels, height, width))
    for launch in (
        kernels.forward_launch(shape, torch.bfloat16),
        kernels.forward_launch(shape, torch.float32),
        kernels.backward_launch(shape),
    ):
        columns = shape[0] * width
        assert (launch.groups - 1) * launch.block_channels < channels
        assert launch.groups * launch.block_channels >= channels
        assert (launch.strips - 1) * launch.rows < height <= launch.strips * launch.rows
        assert launch.strips == 1 or launch.rows >= 8
        assert (launch.column_blocks - 1) * launch.block_columns < columns
        assert columns <= launch.column_blocks * launch.block_columns
        assert 1 <= launch.column_programs <= launch.column_blocks
        assert launch.programs < 2**31


@with_triton
def test_partial_sums_are_a_small_part_of_the_traffic():
    from dsnet_kernels.triton import depthwise_conv3x3 as kernels

    for channels, side in ((32, 56), (64, 28), (160, 14), (256, 7)):
        shape = torch.Size((256, channels, side, side))
        partials = 2 * kernels.backward_launch(shape).slots * kernels.GRADIENT_ROWS * channels * 4
        assert partials < 0.05 * 3 * shape.numel() * 2
