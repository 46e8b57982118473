"""co_attention in Triton: its table of tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dsnet_kernels.triton import co_attention_launches as kernels


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "global_tokens"), [(1, 1), (49, 9), (3136, 49), (66_600, 1025)])
@pytest.mark.parametrize(("width", "heads", "head_dim"), [(5, 1, 8), (32, 1, 32), (384, 3, 128)])
@pytest.mark.parametrize("batch", [1, 256])
def test_tiles_cover_the_problem(
    batch, tokens, global_tokens, width, heads, head_dim, dtype, absorbed
):
    sizes = (batch, tokens, global_tokens, width, 20, heads, head_dim)
    p = kernels.Problem(*sizes, dtype, absorbed)
    assert p.width == (width if absorbed else head_dim)
    for launch in (kernels.to_local_launch(p), kernels.grad_local_launch(p)):
        chunks = -(-p.width // launch.constants["BLOCK_D"])
        blocks = -(-tokens // launch.constants["BLOCK_N"])
        assert launch.programs == batch * (1 if absorbed else heads) * blocks * chunks
        assert launch.programs < 2**31
    for launch, splits in (
        kernels.to_global_launch(p),
        kernels.global_sums_launch(p),
        kernels.grad_global_launch(p),
    ):
        sums_only = launch.kernel is kernels.co_attention_global_sums
        chunks = 1 if sums_only else -(-p.width // launch.constants["BLOCK_D"])
        blocks = -(-global_tokens // launch.constants["BLOCK_M"])
        assert launch.programs == batch * heads * blocks * chunks * splits
        local_blocks = -(-tokens // launch.constants["BLOCK_N"])
        assert 1 <= splits <= kernels.SPLITS
        # No split is empty.
        assert (splits - 1) * -(-local_blocks // splits) < local_blocks
        assert launch.programs < 2**31
    combine = kernels.combine_launch(p)
    rows = -(-batch * global_tokens * heads // combine.constants["BLOCK_T"])
    assert combine.programs == rows * -(-p.width // combine.constants["BLOCK_D"])
