"""Stand-ins leave nothing behind, and give way to a GPU where there is one."""

import importlib

import emulated
import pytest
import torch
from cases.depthwise_conv3x3 import CASE
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
    kernels = importlib.import_module(f"emulated.{CASE.name}").OPERATORS
    forward = kernels[CASE.name]

    def counted(*args, seed):
        calls.append(seed)
        return forward(*args, seed=seed)

    monkeypatch.setitem(kernels, CASE.name, counted)
    inputs, grads = sample(CASE, (1, 5, 3, 3))
    with dsnet_kernels.backend("cpu"):
        before = evaluate(CASE.function, inputs, grads)
    available = dsnet_kernels.available_backends(CASE.name)
    with EMULATED.active():
        for _ in range(3):
            evaluate(CASE.function, inputs, grads)
        with pytest.raises(dsnet_kernels.BackendUnavailable, match=r"torch\.float64"):
            evaluate(CASE.function, sample(CASE, (1, 5, 3, 3), torch.float64)[0])
    # A seed for each raw call, the backward's too.
    assert calls == [0, 2, 4]
    assert dsnet_kernels.available_backends(CASE.name) == available
    with dsnet_kernels.backend("cpu"):
        assert_same_bits(evaluate(CASE.function, inputs, grads), before)
    assert len(calls) == 3


def test_a_failure_in_the_block_restores_the_backends():
    present = dict(OPERATIONS[CASE.name].present)
    with pytest.raises(KeyError), emulated.stand_in(CASE.name):
        raise KeyError
    assert OPERATIONS[CASE.name].present == present
