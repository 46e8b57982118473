"""What only ``upsample_concat`` has in Triton; ``test_interpreter.py`` runs this file."""

import math

import pytest
import torch
from cases.upsample_concat import CASE
from harness import assert_same_bits, compare, run, sample
from variants import variants

from dsnet_kernels import BackendUnavailable, upsample_concat
from dsnet_kernels.triton import products

OP = torch.ops.dsnet_kernels.upsample_concat_triton
OP_BACKWARD = torch.ops.dsnet_kernels.upsample_concat_triton_backward
(TRITON,) = variants(CASE.name)

in_both_dtypes = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)


@in_both_dtypes
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16, 2, 2, 8, 8, 16),
        (1, 25, 41, 7, 11, 3, 5, 7),
        (1, 3, 2, 8, 9, 4, 4, 8),
        (1, 4, 4, 2, 2, 80, 70, 150),
        (3, 1, 1, 1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_shapes(shape, dtype):
    compare(CASE, TRITON, *(sample(CASE, shape, dtype, seed) for seed in range(2)))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 30])
@pytest.mark.parametrize("coarse", [1, 2, 3, 7])
def test_each_pixel_samples_what_torch_samples(size, coarse):
    """One channel with a one at one entry of the coarse grid: the outputs are the weights."""
    grid = torch.eye(coarse).view(coarse, 1, 1, coarse)
    local, weight = torch.zeros(coarse, 1, 1, size), torch.tensor([[0.0, 1.0]])
    grads = torch.eye(size).view(size, 1, 1, size)
    streams = (stream[:1].expand(size, -1, -1, -1) for stream in (local, grid))
    with TRITON.active():
        got = upsample_concat(local, grid, weight, None)
        _, adjoint, _, _ = OP_BACKWARD(grads, *streams, weight, None)
    expected = torch.nn.functional.interpolate(grid, size=(1, size), mode="bilinear")
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-7 * coarse)
    assert torch.equal(adjoint[:, 0, 0], got[:, 0, 0].T)


def test_slots_of_several_row_blocks(monkeypatch):
    monkeypatch.setattr(products, "SLOTS", 2)
    compare(CASE, TRITON, sample(CASE, (3, 7, 5, 5, 4, 3, 5, 7)))


def test_nan_behind_the_last_row():
    inputs, grads = sample(CASE, (1, 3, 7, 2, 3, 5, 3, 9))

    def behind(t):
        memory = torch.full((t.numel() + 4096,), math.nan)
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    spoilt = {k: behind(v) for k, v in inputs.items()}
    with TRITON.active():
        expected = run(CASE, TRITON, inputs, grads)
        got = run(CASE, TRITON, spoilt, [behind(grad) for grad in grads])
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert_same_bits(got, expected)


# Bad arguments

LOCAL, GLOBAL, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(2, 3, 2, 2), torch.zeros(6, 7)
OUT = torch.zeros(2, 6, 5, 5)


@pytest.mark.parametrize(
    ("operator", "args", "error", "message"),
    [
        (OP, (LOCAL[0], GLOBAL, WEIGHT, None, None, None), ValueError, "local: expected 4"),
        (OP, (LOCAL, GLOBAL[:1], WEIGHT, None, None, None), ValueError, "global_: expected shape"),
        (OP, (LOCAL[..., :0], GLOBAL, WEIGHT, None, None, None), ValueError, "local: expected at"),
        (
            OP,
            (LOCAL, GLOBAL, WEIGHT[:, :3], None, None, None),
            ValueError,
            "weight: expected shape",
        ),
        (OP, (LOCAL, GLOBAL, WEIGHT, WEIGHT, None, None), ValueError, "bias: expected shape"),
        (OP, (LOCAL, GLOBAL, WEIGHT, None, LOCAL, None), ValueError, "residual: expected shape"),
        (OP, (LOCAL, GLOBAL.half(), WEIGHT, None, None, None), TypeError, "global_: expected"),
        (
            OP,
            (LOCAL.double(), GLOBAL, WEIGHT, None, None, None),
            TypeError,
            "local is torch.float64",
        ),
        (OP_BACKWARD, (OUT[:1], LOCAL, GLOBAL, WEIGHT, None), ValueError, "grad: expected shape"),
        (OP_BACKWARD, (OUT.half(), LOCAL, GLOBAL, WEIGHT, None), TypeError, "grad: expected"),
        (OP_BACKWARD, (OUT, LOCAL, GLOBAL, WEIGHT, OUT), ValueError, "branch_scale: expected"),
    ],
)
def test_the_raw_operators_check_too(operator, args, error, message):
    with pytest.raises(error, match=message):
        operator(*args)


def test_refusals_with_the_reason():
    with pytest.raises(BackendUnavailable, match="triton: global_ has no channels"):
        upsample_concat(LOCAL, GLOBAL[:, :0], WEIGHT[:, :4], None, backend="triton")
    local, global_, weight = (t.bfloat16() for t in (LOCAL, GLOBAL, WEIGHT))
    with pytest.raises(BackendUnavailable, match=r"triton: local is .*bfloat16.*interpreter"):
        upsample_concat(local, global_, weight, None, backend="triton")
