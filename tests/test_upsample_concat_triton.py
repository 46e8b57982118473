"""upsample_concat in Triton: its table of tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dsnet_kernels.triton import upsample_concat as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(1, 1), (7, 9), (200, 333)])
@pytest.mark.parametrize(("local", "channels"), [(1, 2), (32, 64), (160, 320), (100, 301)])
@pytest.mark.parametrize("batch", [1, 256])
def test_tiles_cover_the_problem(batch, grid, local, channels, dtype):
    p = kernels.Problem(batch, grid, (3, 4), local, channels - local, channels, dtype)
    for launch, rows in (
        (kernels.forward_launch(p), p.pixels),
        (kernels.adjoint_launch(batch * 12, channels), batch * 12),
    ):
        blocks = -(-channels // launch.constants["BLOCK_N"])
        assert launch.programs == blocks * -(-rows // launch.constants["BLOCK_T"])
        assert launch.programs < 2**31
