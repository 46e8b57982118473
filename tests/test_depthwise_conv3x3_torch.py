"""depthwise_conv3x3 as a citizen of torch: autograd, compile, export, autocast, errors."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from harness import evaluate, variants
from test_depthwise_conv3x3 import CASE, generator, make, on_every_variant
from torch._subclasses.fake_tensor import FakeTensorMode

import dsnet_kernels
from dsnet_kernels import depthwise_conv3x3, native
from dsnet_kernels.reference import depthwise_conv3x3 as reference

OP = torch.ops.dsnet_kernels.depthwise_conv3x3
OP_BACKWARD = torch.ops.dsnet_kernels.depthwise_conv3x3_backward


def float64_inputs(shape=(2, 3, 4, 3)):
    (x, weight, bias), kwargs = make(shape, torch.float64, generator(0))
    return x, weight, bias, kwargs["scale"], kwargs["shift"]


@on_every_variant
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (1, 9, 1, 2)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(variant, shape, residual):
    inputs = [t.requires_grad_() for t in float64_inputs(shape)]

    def function(x, weight, bias, scale, shift):
        return depthwise_conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual)

    with variant.active():
        assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


def test_the_reference_differentiates_twice_and_forward():
    inputs = [t.requires_grad_() for t in float64_inputs((1, 2, 3, 3))]
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
def test_forward_mode_and_second_derivatives_raise_rather_than_lie(variant):
    x, weight, *_ = float64_inputs()
    with variant.active():
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: depthwise_conv3x3(x, weight), (x,), (x,))
        x.requires_grad_()
        (grad,) = torch.autograd.grad(
            depthwise_conv3x3(x, weight).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@on_every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(variant, dtype):
    (x, weight, bias), kwargs = make((2, 5, 4, 6), dtype, generator(0))
    scale, shift = kwargs["scale"], kwargs["shift"]
    with variant.active():
        for args in (
            (x, weight, bias, scale, shift, True),
            (x.contiguous(), weight, None, None, None, False),
            (x[:0], weight, bias, None, shift, True),
        ):
            torch.library.opcheck(OP, args)
        torch.library.opcheck(OP_BACKWARD, (x, x, weight, scale, shift, True))
        torch.library.opcheck(OP_BACKWARD, (x[:0], x[:0], weight, None, None, False))


@on_every_variant
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(variant, dynamic):
    torch.compiler.reset()

    def function(x, weight, bias, scale, shift):
        return depthwise_conv3x3(x, weight, bias, scale=scale, shift=shift, residual=True).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    with variant.active():
        for shape in ((2, 8, 6, 6), (3, 8, 9, 5)) if dynamic else ((2, 8, 6, 6),):
            (x, weight, bias), kwargs = make(shape, torch.float32, generator(1))
            inputs = ((x, weight, bias, kwargs["scale"], kwargs["shift"]), {})
            grads = [torch.ones(shape)]
            expected, got = evaluate(function, inputs, grads), evaluate(compiled, inputs, grads)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value)


@on_every_variant
def test_compiles_with_one_tensor_for_several_parameters(variant):
    torch.compiler.reset()

    def function(x, weight, vector):
        return depthwise_conv3x3(x, weight, vector, scale=vector, shift=vector).relu()

    compiled = torch.compile(function, fullgraph=True)
    (x, weight, vector), _ = make((2, 8, 6, 6), torch.float32, generator(1))
    inputs, grads = ((x, weight, vector), {}), [torch.ones_like(x)]
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


@on_every_variant
def test_autocast_takes_the_activation_only(variant):
    (x, weight, bias), _ = make((2, 8, 6, 6), torch.float32, generator(0))
    weight.requires_grad_()
    with variant.active(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = depthwise_conv3x3(x, weight, bias, residual=True)
    assert out.dtype == torch.bfloat16
    with variant.active():
        assert torch.equal(out, depthwise_conv3x3(x.bfloat16(), weight, bias, residual=True))
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    with variant.active(), torch.autocast("cpu", dtype=torch.bfloat16):
        double = depthwise_conv3x3(x.double(), weight.detach().double())
    assert double.dtype == torch.float64


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


@on_every_variant
def test_functional_gradients(variant):
    x, weight, *_ = float64_inputs()

    def loss(x, weight):
        return depthwise_conv3x3(x, weight, residual=True).square().sum()

    with variant.active():
        got = torch.func.grad(loss, argnums=(0, 1))(x, weight)
    with dsnet_kernels.backend("reference"):
        expected = torch.func.grad(loss, argnums=(0, 1))(x, weight)
    torch.testing.assert_close(got, expected)


def parameter_loss(weight, bias, scale, shift, x):
    out = depthwise_conv3x3(x, weight, bias, scale=scale, shift=shift, residual=True)
    return out.sin().sum()


MAPPED = {
    "x": (None, None, None, None, 0),
    "x last": (None, None, None, None, 4),
    "parameters": (0, 0, 0, 0, None),
    "some": (0, None, 1, None, 2),
    "all": (0, 0, 0, 0, 0),
}


def mapped_inputs(in_dims, samples=3):
    x, *parameters = float64_inputs()
    return [
        t
        if dim is None
        else torch.randn(samples, *t.shape, generator=generator(7), dtype=t.dtype)
        .movedim(0, dim)
        .contiguous()
        for t, dim in zip((*parameters, x), in_dims, strict=True)
    ]


@on_every_variant
@pytest.mark.parametrize("in_dims", MAPPED.values(), ids=MAPPED)
def test_vmap_over_values_and_gradients(variant, in_dims):
    def forward(weight, bias, scale, shift, x):
        return depthwise_conv3x3(x, weight, bias, scale=scale, shift=shift, residual=True)

    inputs = mapped_inputs(in_dims)
    gradients = torch.func.grad(parameter_loss, argnums=(0, 1, 2, 3, 4))
    functions = [
        torch.func.vmap(forward, in_dims),
        torch.func.vmap(gradients, in_dims),
        torch.func.grad(
            lambda *args: torch.func.vmap(parameter_loss, in_dims)(*args).sum(), (0, 1, 2, 3, 4)
        ),
    ]
    for function in functions:
        with variant.active():
            got = function(*inputs)
        with dsnet_kernels.backend("reference"):
            expected = function(*inputs)
        torch.testing.assert_close(got, expected)


@on_every_variant
@pytest.mark.parametrize("in_dims", MAPPED.values(), ids=MAPPED)
def test_vmap_is_differentiable(variant, in_dims):
    inputs = [t.requires_grad_() for t in mapped_inputs(in_dims)]
    with variant.active():
        got = torch.autograd.grad(torch.func.vmap(parameter_loss, in_dims)(*inputs).sum(), inputs)
    with dsnet_kernels.backend("reference"):
        loss = torch.func.vmap(parameter_loss, in_dims)(*inputs).sum()
        torch.testing.assert_close(got, torch.autograd.grad(loss, inputs))


@on_every_variant
def test_nested_vmap_and_inference_mode(variant):
    x, weight, *_ = float64_inputs()
    xs = torch.stack([torch.stack([x, 2 * x]), torch.stack([3 * x, 4 * x]), torch.stack([x, -x])])
    expected = reference(xs.flatten(0, 2), weight).unflatten(0, xs.shape[:3])
    function = torch.func.vmap(torch.func.vmap(lambda x: depthwise_conv3x3(x, weight)))
    with variant.active():
        torch.testing.assert_close(function(xs), expected)
        with torch.inference_mode():
            torch.testing.assert_close(function(xs), expected)


@on_every_variant
def test_only_the_gradients_asked_for(variant):
    (x, weight, bias), kwargs = make((2, 8, 6, 6), torch.float32, generator(0))
    weight.requires_grad_()
    with variant.active():
        depthwise_conv3x3(x, weight, bias, **kwargs).sum().backward()
    assert weight.grad is not None
    assert x.grad is bias.grad is None


@on_every_variant
def test_inference_mode_gives_the_same_bits(variant):
    (x, weight, bias), kwargs = make((2, 8, 6, 6), torch.float32, generator(0))
    with variant.active():
        expected = depthwise_conv3x3(x, weight, bias, **kwargs)
        with torch.inference_mode():
            assert torch.equal(depthwise_conv3x3(x, weight, bias, **kwargs), expected)


@on_every_variant
def test_eight_threads_at_once(variant):
    inputs = [make((2, 24, 13, 9), torch.float32, generator(seed)) for seed in range(8)]
    grads = [torch.randn(2, 24, 13, 9) for _ in inputs]
    results: dict[int, list] = {}

    def work(i: int) -> None:
        results[i] = [evaluate(depthwise_conv3x3, inputs[i], [grads[i]]) for _ in range(20)]

    with variant.active():
        expected = [evaluate(depthwise_conv3x3, i, [g]) for i, g in zip(inputs, grads, strict=True)]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, wanted in enumerate(expected):
        assert len(results[i]) == 20
        for got in results[i]:
            assert all(torch.equal(value, got[name]) for name, value in wanted.items())


X, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize("backend", ["reference", *{v.backend for v in variants(CASE.name)}])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], WEIGHT), {}, ValueError, r"x: expected 4 dimensions .* got shape \(4, 5, 5\)"),
        (([1.0], WEIGHT), {}, TypeError, "x: expected a Tensor, got list"),
        ((X.int(), WEIGHT), {}, TypeError, "x: expected one of float32, .* got torch.int32"),
        ((X.cfloat(), WEIGHT), {}, TypeError, "x: expected one of float32"),
        ((X.to_sparse(), WEIGHT), {}, TypeError, "x: expected layout torch.strided, got torch.sp"),
        ((X.to_mkldnn(), WEIGHT), {}, TypeError, "x: expected layout torch.strided, got torch._mk"),
        ((X[..., :0], WEIGHT), {}, ValueError, r"x: expected at least one .*\(2, 4, 5, 0\)"),
        ((X[:, 4:], WEIGHT), {}, ValueError, r"x: expected at least one .*\(2, 0, 5, 5\)"),
        (
            (X, WEIGHT[:3]),
            {},
            ValueError,
            r"weight: expected shape \(4, 1, 3, 3\), got \(3, 1, 3, 3\)",
        ),
        ((X, torch.zeros(4, 1, 5, 5)), {}, ValueError, r"weight: expected shape .*\(4, 1, 5, 5\)"),
        ((X, WEIGHT, torch.zeros(3)), {}, ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        ((X, WEIGHT), {"scale": torch.zeros(4, 1)}, ValueError, r"scale: expected shape \(4,\)"),
        ((X, WEIGHT), {"shift": 1.0}, TypeError, "shift: expected a Tensor, got float"),
        (
            (X, WEIGHT.double()),
            {},
            TypeError,
            "weight: expected torch.float32 .* got torch.float64",
        ),
        ((X.bfloat16(), WEIGHT.half()), {}, TypeError, "weight: expected torch.bfloat16 or"),
        ((X, WEIGHT.to("meta")), {}, ValueError, "weight: expected the device of x, cpu, got meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_argument_expected_and_got(backend, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv3x3(*args, backend=backend, **kwargs)


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
