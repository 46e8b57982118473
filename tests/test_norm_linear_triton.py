"""The linear map of normalised tokens in Triton: its table of tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dsnet_kernels.triton import norm_linear as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 49, 65, 1025 * 256])
@pytest.mark.parametrize(("width", "outputs"), [(5, 24), (32, 96), (160, 480), (2048, 6144)])
def test_tiles_cover_the_problem(rows, width, outputs, dtype):
    p = kernels.NormLinear(rows, width, outputs, dtype)
    forward = kernels.forward_launch(p)
    columns = -(-outputs // forward.constants["BLOCK_N"])
    assert forward.programs == columns * -(-rows // forward.constants["BLOCK_T"])
    grad_x = kernels.grad_x_launch(p)
    assert grad_x.programs == -(-rows // grad_x.constants["BLOCK_T"])
    launch, slots = kernels.grad_weight_launch(p)
    assert 1 <= slots <= kernels.SLOTS
    assert (slots - 1) * launch.constants["BLOCK_T"] < rows
    summed, blocks = kernels.sum_slots_launch(p, slots)
    assert blocks * summed.constants["BLOCK_N"] >= outputs
    assert summed.constants["BLOCK_SLOTS"] >= slots
    assert max(launch.programs, summed.programs, grad_x.programs) < 2**31
