"""global_attention in Triton: its table of tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dsnet_kernels.triton import global_attention as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 49, 64, 65, 1025])
@pytest.mark.parametrize(("width", "heads"), [(8, 1), (32, 1), (160, 5), (384, 12), (2048, 16)])
@pytest.mark.parametrize("batch", [1, 256])
def test_tiles_cover_the_problem(batch, tokens, width, heads, dtype):
    p = kernels.Problem(batch, tokens, width, heads, dtype)
    if p.few:
        assert kernels.few_launch(p, None).constants["BLOCK_T"] >= tokens
    else:
        for name, launch in kernels.many_launches(p).items():
            block = launch.constants["BLOCK_K" if name == "grad_kv" else "BLOCK_Q"]
            blocks, rest = divmod(launch.programs, batch * heads)
            assert rest == 0
            assert (blocks - 1) * block < tokens <= blocks * block
