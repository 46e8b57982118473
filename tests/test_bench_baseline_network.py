"""The baseline network of ``dsnet bench``: the same function with torch's own norms."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsnet.bench.baseline_network import with_torch_norms
from dsnet.block import DSBlock


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def block(backend="reference"):
    torch.manual_seed(0)
    made = DSBlock(16, 2, 2, backend=backend).double()
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return made


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_the_same(training, sdpa):
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    ours, plain = block().train(training), with_torch_norms(block(), sdpa).train(training)
    expected, found = ours(x), plain(x)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, a), (other, b) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(b.grad, a.grad, msg=name, rtol=1e-6, atol=1e-8)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_a_norm_of_evaluation_is_one_operator():
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    with torch.no_grad(), Calls() as plain:
        with_torch_norms(block()).eval()(x)
    assert (
        plain.names["native_batch_norm"] + plain.names["_native_batch_norm_legit_no_training"] == 4
    )
    assert not {"rsqrt", "addcmul"} & set(plain.names)
    with torch.no_grad(), Calls() as ours:
        block().eval()(x)
    assert ours.names["rsqrt"] == 3
    assert sum(ours.names.values()) - sum(plain.names.values()) >= 3 * 5
