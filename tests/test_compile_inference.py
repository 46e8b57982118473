"""torch.compile of whole networks for inference, on widths that the kernels take."""

import contextlib
from dataclasses import replace

import pytest
import torch
from small_network import SMALL, backends_chosen, images, randomise, small

import dsnet
from dsnet_kernels import native

MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.fixture(autouse=True)
def dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network():
    return randomise(small(dtype=torch.float32, variant=replace(SMALL, depths=(1, 1, 1, 1))))


@pytest.mark.parametrize(
    ("mode", "compiler"), [*((mode, "eager") for mode in MODES), ("no_grad", "aot_eager")]
)
@pytest.mark.parametrize("optimised", [False, True], ids=["model", "optimised"])
def test_compiles_as_one_graph_in_every_mode(optimised, mode, compiler):
    with torch.no_grad():
        model, x = network(), images(32, 32, batch=1, dtype=torch.float32)
        expected = model(x)
        if native.CPU.refusal is None:
            assert set(backends_chosen(model, x)) == {"cpu"}
    module = dsnet.optimize(model) if optimised else model
    compiled = torch.compile(module, fullgraph=True, backend=compiler, dynamic=False)
    with MODES[mode]():
        got = compiled(x)
    assert got.requires_grad == (mode == "grad" and not optimised)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-3, atol=1e-3)


def test_a_float32_tensor_is_cast_under_autocast_in_a_compiled_graph():
    with torch.no_grad():
        model, x = network(), images(32, 32, batch=1, dtype=torch.float32)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
