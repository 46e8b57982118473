"""Stand-ins leave nothing behind, and give way to a GPU where there is one."""

import emulated
import emulator_build
import pytest
import torch
from cases.depthwise_conv3x3 import CASE
from emulated.memory import Memory
from harness import assert_same_bits, evaluate, sample
from variants import Variant, gpu_mark, gpu_variants, variants

import dsnet_kernels
from dsnet_kernels import triton
from dsnet_kernels.backends import OPERATIONS

EMULATED = Variant(CASE.name, "cuda", stand_in="emulated")


def test_with_a_gpu_its_backends_are_under_test_and_marked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(OPERATIONS[CASE.name].present, backend, lambda: None)
    found = [variant for variant in variants(CASE.name) if variant.backend != "cpu"]
    assert found == gpu_variants(CASE.name)
    assert [str(variant) for variant in found] == ["cuda", "triton"]
    assert all(gpu_mark(variant) == (pytest.mark.gpu,) for variant in found)


def test_a_gpu_backend_that_is_not_there_has_no_variant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setitem(OPERATIONS[CASE.name].present, "cuda", lambda: "not built")
    monkeypatch.setitem(OPERATIONS[CASE.name].present, "triton", lambda: None)
    assert [str(v) for v in variants(CASE.name) if v.backend != "cpu"] == ["triton"]


def test_the_emulator_is_what_runs_and_only_in_the_block(monkeypatch):
    calls = []
    emulated_call = emulated.call

    def counted(name, operator, *args, seed):
        calls.append((operator, seed))
        return emulated_call(name, operator, *args, seed=seed)

    monkeypatch.setattr(emulated, "call", counted)
    inputs, grads = sample(CASE, (1, 5, 3, 3))
    with dsnet_kernels.backend("cpu"):
        before = evaluate(CASE.function, inputs, grads)
    available = dsnet_kernels.available_backends(CASE.name)
    with EMULATED.active():
        for _ in range(3):
            evaluate(CASE.function, inputs, grads)
        with pytest.raises(dsnet_kernels.BackendUnavailable, match=r"torch\.float64"):
            evaluate(CASE.function, sample(CASE, (1, 5, 3, 3), torch.float64)[0])
    # Every raw call has another seed.
    assert calls == list(zip(emulated.operators(CASE.name) * 3, range(6), strict=True))
    assert dsnet_kernels.available_backends(CASE.name) == available
    with dsnet_kernels.backend("cpu"):
        assert_same_bits(evaluate(CASE.function, inputs, grads), before)
    assert len(calls) == 6


def test_a_failure_in_the_block_restores_the_backends():
    present = dict(OPERATIONS[CASE.name].present)
    with pytest.raises(KeyError), emulated.stand_in(CASE.name):
        raise KeyError
    assert OPERATIONS[CASE.name].present == present


# The memory of emulated bindings


@pytest.fixture
def memory():
    return Memory(emulator_build.load(CASE.name), "a test")


def floats(*sizes):
    return torch.empty(sizes, dtype=torch.float32)


def test_torch_may_not_read_what_nobody_wrote(memory):
    with memory:
        a, b, out = floats(2, 3), floats(3, 2), floats(2, 2)
        a.zero_()
        for read in (lambda: torch.mm(a, b, out=out), lambda: b.t().contiguous(), lambda: b.half()):
            with pytest.raises(RuntimeError, match=r"allocation 1 of a test, .*: nobody wrote 24"):
                read()
        b.zero_()
        torch.mm(a, b, out=out)
    assert memory.unwritten(out) == 0
    assert torch.equal(out, torch.zeros(2, 2))


def test_a_product_writes_no_more_than_its_result(memory):
    with memory:
        a, b, out = floats(2, 2), floats(2, 2), floats(4, 3)
        a.zero_()
        b.zero_()
        torch.mm(a, b, out=out[:2, :2])
    assert memory.unwritten(out) == 4 * (12 - 4)


def test_copies_hold_values_and_views_share_them(memory):
    with memory:
        x = floats(2, 3)
        x.zero_()
        transposed = x.t().contiguous()
        assert x.view(6).data_ptr() == x.data_ptr()
    assert memory.unwritten(x[:, 1:]) == memory.unwritten(transposed) == 0
    assert memory.emulator.Buffer.find(transposed.data_ptr()).writable is False


def test_of_an_argument_only_its_own_elements_hold_values(memory):
    whole = torch.arange(12.0).view(3, 4)
    placed = memory.place("x", whole[:, 1:3])
    assert torch.equal(placed, whole[:, 1:3])
    assert memory.unwritten(placed) == 0
    assert memory.unwritten(placed.as_strided((12,), (1,), 0)) == 4 * 6


def test_a_result_that_was_not_written_is_noticed():
    forward, _ = emulated.functions(CASE.name)
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)
    with pytest.raises(AssertionError, match="some values of result 0 are unwritten"):
        forward(x, weight, None, None, None, False, strips=1, rows=2)
