"""depthwise_conv3x3 as a citizen of torch, where one operation stands for all."""

import os
import subprocess
import sys

import pytest
import torch
from cases.depthwise_conv3x3 import CASE
from harness import evaluate, generator, inputs_on, placed, sample, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from variants import on_variants

import dsnet_kernels
from dsnet_kernels import depthwise_conv3x3, native
from dsnet_kernels.reference import depthwise_conv3x3 as reference

OP = torch.ops.dsnet_kernels.depthwise_conv3x3
OP_BACKWARD = torch.ops.dsnet_kernels.depthwise_conv3x3_backward
X, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(4, 1, 3, 3)

on_every_variant = on_variants(CASE.name)


def test_the_reference_differentiates_twice_and_forward():
    inputs = CASE.make((1, 2, 3, 3), torch.float64, generator(0))
    inputs = [tensor.requires_grad_() for tensor in tensors_of(inputs).values()]
    with dsnet_kernels.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x, w, b, s, t: depthwise_conv3x3(x, w, b, scale=s, shift=t), inputs
        )
        x = inputs[0].detach()
        _, tangent = torch.func.jvp(
            lambda x: depthwise_conv3x3(x, inputs[1].detach()), (x,), (torch.ones_like(x),)
        )
    expected = reference(torch.ones_like(x), inputs[1].detach())
    torch.testing.assert_close(tangent, expected)


@on_every_variant
def test_compiles_with_one_tensor_for_several_parameters(variant):
    torch.compiler.reset()

    def function(x, weight, vector):
        return depthwise_conv3x3(x, weight, vector, scale=vector, shift=vector).relu()

    compiler = "inductor" if variant.is_compiled else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    made, grads = sample(CASE, (2, 8, 6, 6))
    inputs = {"x": made["x"], "weight": made["weight"], "vector": made["bias"]}
    inputs, grads = inputs_on(variant.device, inputs), [placed(grads[0], variant.device)]
    with variant.active():
        expected, got = evaluate(function, inputs, grads), evaluate(compiled, inputs, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_compiled_code_follows_a_change_of_backend():
    torch.compiler.reset()
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    compiled = torch.compile(depthwise_conv3x3, fullgraph=True)
    with dsnet_kernels.backend("cpu"):
        assert compiled(x, weight).is_contiguous(memory_format=torch.channels_last)
    with dsnet_kernels.backend("reference"):
        assert compiled(x, weight).is_contiguous()


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        return depthwise_conv3x3(x, self.conv.weight, self.conv.bias, residual=True, backend="cpu")


def test_exports_with_dynamic_shapes():
    module, x = Module().eval(), torch.randn(2, 6, 8, 8)
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 2: height},))
    assert any("depthwise_conv3x3" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(3, 6, 5, 8)
    torch.testing.assert_close(program.module()(other), module(other))


def test_packages_ahead_of_time(tmp_path):
    module, x = Module().eval(), torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "module.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(x), module(x))


def test_meta_and_fake_tensors():
    meta = depthwise_conv3x3(
        torch.empty(2, 4, 5, 6, device="meta"), torch.empty(4, 1, 3, 3, device="meta")
    )
    assert meta.device.type == "meta"
    assert meta.shape == (2, 4, 5, 6)
    with FakeTensorMode():
        x = torch.empty(2, 4, 5, 6, requires_grad=True)
        weight = torch.empty(4, 1, 3, 3, requires_grad=True)
        out = depthwise_conv3x3(x, weight, backend="cpu")
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.sum().backward()
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], WEIGHT, None, None, None, True), "x: expected shape"),
        ((X, WEIGHT[:3], None, None, None, True), r"weight: expected shape \(4, 1, 3, 3\), got"),
        ((X, WEIGHT, WEIGHT, None, None, True), r"bias: expected shape \(4\)"),
        ((X, WEIGHT.double(), None, None, None, True), "weight: expected x's dtype or float32"),
        ((X.half(), WEIGHT, None, None, None, True), "x: expected float32, bfloat16 or float64"),
    ],
)
def test_the_native_operator_checks_too(args, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*args)


def test_native_backward_refuses_a_gradient_of_another_dtype():
    with pytest.raises(RuntimeError, match="grad: expected x's dtype"):
        OP_BACKWARD(X.double(), X, WEIGHT, None, None, True)


def test_float16_has_no_cpu_kernel_and_auto_says_so():
    x, weight = X.half(), WEIGHT.half()
    with pytest.raises(dsnet_kernels.BackendUnavailable, match="float16"):
        depthwise_conv3x3(x, weight, backend="cpu")
    explanation = dsnet_kernels.explain("depthwise_conv3x3", x)
    assert explanation.chosen == "reference"
    assert "float16" in explanation.refusals["cpu"]
    assert depthwise_conv3x3(x, weight).dtype == torch.float16


@pytest.mark.parametrize("name", ["generic", "sse9"])
def test_capability_from_the_environment(name, tmp_path):
    code = (
        "import dsnet_kernels as k\n"
        "import torch\n"
        "print(k.info()['machine']['cpu_capability'], k.native.CPU.refusal)\n"
        "print(k.depthwise_conv3x3(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, "DSNET_CPU_CAPABILITY": name},
        cwd=tmp_path if native.__file__.startswith(sys.prefix) else None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "49.0" in done.stdout
    if name == "generic":
        assert "generic None" in done.stdout
    else:
        assert "DSNET_CPU_CAPABILITY: expected one of" in done.stdout
        assert "RuntimeWarning" in done.stderr
