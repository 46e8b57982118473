"""pointwise_mlp in Triton: its table of tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dsnet_kernels.triton import pointwise_mlp as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 49, 65, 12_544, 66_600 * 64])
@pytest.mark.parametrize(("width", "hidden"), [(5, 24), (64, 256), (128, 512), (320, 1280)])
def test_tiles_cover_the_problem(rows, width, hidden, dtype):
    p = kernels.Problem(rows, rows, width, hidden, dtype)
    assert p.fused == (dtype == torch.bfloat16 and width <= 128)
    for launch, outputs in (
        (kernels.hidden_launch(p), hidden),
        (kernels.grad_hidden_launch(p), hidden),
        (kernels.residual_launch(p, (hidden, 1)), width),
        (kernels.residual_launch(p, (1, width)), width),
    ):
        columns = -(-outputs // launch.constants["BLOCK_N"])
        assert launch.programs == columns * -(-rows // launch.constants["BLOCK_T"])
        # The padding of what is kept is that of the last block.
        assert launch.constants["BLOCK_T"] % 16 == 0
        assert launch.programs < 2**31


@pytest.mark.parametrize("rows", [1, 49, 65, 12_544, 66_600 * 64])
@pytest.mark.parametrize(("width", "hidden"), [(5, 24), (17, 68), (64, 256), (128, 512)])
def test_fused_tiles_cover_the_problem(rows, width, hidden):
    p = kernels.Problem(rows, rows, width, hidden, torch.float16)
    for launch in (kernels.forward_launch(p), kernels.grad_x_launch(p)):
        assert launch.programs == -(-rows // launch.constants["BLOCK_T"])
        assert launch.constants["BLOCK_T"] % 16 == 0
    launch, slots = kernels.grad_weights_launch(p)
    assert 1 <= slots <= kernels.SLOTS
    assert launch.programs == slots * -(-hidden // launch.constants["BLOCK_R"])
    # No slot is empty.
    assert (slots - 1) * launch.constants["BLOCK_T"] < rows


def test_large_problems_have_large_tiles():
    """One pass over the weights then serves twice the rows."""
    few, many = (kernels.Problem(r, r, 64, 256, torch.bfloat16) for r in (3136, 200_704))
    tiles = [kernels.forward_launch(p).constants["BLOCK_T"] for p in (few, many)]
    assert tiles == [64, 128]
    wide = kernels.Problem(12_544, 196, 320, 1280, torch.bfloat16)
    for launch, columns in (
        (kernels.hidden_launch(wide), 128),
        (kernels.grad_hidden_launch(wide), 64),
        (kernels.residual_launch(wide, (1280, 1)), 64),
    ):
        assert (launch.constants["BLOCK_T"], launch.constants["BLOCK_N"]) == (128, columns)
