"""Every operation as a citizen of torch: raw operators, derivatives, compilers, modes, errors."""

import itertools
import re
import threading

import pytest
import torch
from cases import (
    CASES,
    in_float64,
    on_compiled_kernels,
    on_every_kernel,
    on_every_kernel_and_dtype,
    on_every_variant,
)
from harness import (
    assert_same_bits,
    evaluate,
    generator,
    inputs_on,
    outputs_of,
    placed,
    run,
    sample,
    tensors_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dsnet_kernels


def tolerance(dtype):
    """Of results whose errors other tests bound: enough to tell a wrong rule from a right one."""
    return {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}


def placed_inputs(case, variant, dtype=torch.float32, shape=None):
    inputs = case.make(shape or case.small[0], dtype, generator(0))
    return inputs_on(variant.device, inputs)


class RawCalls(TorchDispatchMode):
    """Keeps the calls of raw operators that happen in its block."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "dsnet_kernels":
            self.calls.append((operator, args))
        return operator(*args, **(kwargs or {}))


# Raw operators


def as_leaf(argument):
    """A tensor without its history, which opcheck takes for part of the operator."""
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad)


@on_every_kernel_and_dtype
def test_opcheck(case, variant, dtype):
    first, second, *_ = case.options.values()
    plain, plain_grads = sample(case, case.small[0], dtype, option=second)
    plain |= {name: plain[name].contiguous() for name in case.activations}
    for inputs, grads in (
        sample(case, case.small[0], dtype, option=first),
        (plain, [grad.contiguous() for grad in plain_grads]),
        sample(case, (0, *case.small[0][1:]), dtype, option=first),
    ):
        with variant.active(), RawCalls() as raw:
            run(case, variant, inputs, grads)
        names = [operator._schema.name for operator, _ in raw.calls]
        assert any(name.endswith("_backward") for name in names)
        assert not all(name.endswith("_backward") for name in names)
        with variant.active():
            for operator, args in raw.calls:
                torch.library.opcheck(operator, tuple(as_leaf(arg) for arg in args))


# Derivatives


@in_float64
def test_gradcheck(case, variant):
    for shape, option in itertools.product(case.tiny, case.options.values()):
        inputs, _ = sample(case, shape, torch.float64, option=option)
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors_of(inputs).items()}

        def function(*tensors, inputs=inputs, names=tuple(leaves)):
            return case.function(**inputs | dict(zip(names, tensors, strict=True)))

        with variant.active():
            assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=False)


@on_every_kernel
def test_forward_mode_and_second_derivatives_raise_rather_than_lie(case, variant):
    inputs = placed_inputs(case, variant)
    name, *_ = tensors_of(inputs)

    def function(tensor):
        return outputs_of(case.function(**inputs | {name: tensor}))[0].square().sum()

    tensor = inputs[name]
    with variant.active():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="jvp"):
                torch.func.jvp(function, (tensor,), (tensor,))
        tensor.requires_grad_()
        (grad,) = torch.autograd.grad(function(tensor), tensor, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@on_every_variant
def test_only_the_gradients_asked_for(case, variant):
    inputs = placed_inputs(case, variant)
    with variant.active():
        for name, tensor in tensors_of(inputs).items():
            leaf = tensor.detach().clone().requires_grad_()
            outputs = outputs_of(case.function(**inputs | {name: leaf}))
            sum(out.sum() for out in outputs).backward()
            assert leaf.grad.shape == leaf.shape
    assert all(tensor.grad is None for tensor in tensors_of(inputs).values())


@on_every_variant
def test_inference_mode_gives_the_same_bits(case, variant):
    inputs = placed_inputs(case, variant)
    with variant.active():
        expected = evaluate(case.function, inputs)
        with torch.inference_mode():
            assert_same_bits(evaluate(case.function, inputs), expected)


# torch.func


def positional(case, inputs):
    """A function of the inputs' tensors alone, and a loss of it."""
    names = tuple(tensors_of(inputs))

    def function(function, *tensors):
        return function(**inputs | dict(zip(names, tensors, strict=True)))

    def loss(function_, *tensors):
        return sum(out.sin().sum() for out in outputs_of(function(function_, *tensors)))

    return function, loss


MAPPED = {
    "first": lambda i, rank: 0 if i == 0 else None,
    "first, last dimension": lambda i, rank: rank if i == 0 else None,
    "others": lambda i, rank: None if i == 0 else 0,
    "every second": lambda i, rank: None if i % 2 else min(1, rank),
    "all": lambda i, rank: 0,
}
STAND_IN_MAPPED = ("first, last dimension", "others")
"""For what runs a kernel slowly: between them every input is mapped."""


@on_every_variant
def test_vmap_over_values_and_gradients(case, variant):
    for mapping in STAND_IN_MAPPED if variant.stand_in else MAPPED:
        assert_vmap_is_the_references(case, variant, MAPPED[mapping])


def assert_vmap_is_the_references(case, variant, in_dim):
    """With ``in_dim`` of the position and the rank of each input."""
    dtype = variant.widest
    inputs, *others = (case.make(case.tiny[0], dtype, generator(seed)) for seed in range(3))
    # Of each tensor the case's own values: weights of another size would make steep softmaxes.
    tensors, *more = (list(tensors_of(each).values()) for each in (inputs, *others))
    in_dims = tuple(in_dim(i, tensor.dim()) for i, tensor in enumerate(tensors))
    samples = [
        each[0] if dim is None else torch.stack(each).movedim(0, dim).clone()
        for dim, *each in zip(in_dims, tensors, *more, strict=True)
    ]
    places = tuple(range(len(tensors)))
    function, loss = positional(case, inputs)

    def results(kernel, device):
        """Values, gradients per sample, and gradients through vmap, by torch.func and autograd."""
        here = [placed(tensor, device) for tensor in samples]

        def total(*tensors):
            return torch.func.vmap(lambda *t: loss(kernel, *t), in_dims)(*tensors).sum()

        gradients = torch.func.grad(lambda *t: loss(kernel, *t), places)
        leaves = [tensor.detach().requires_grad_() for tensor in here]
        found = (
            torch.func.vmap(lambda *t: function(kernel, *t), in_dims)(*here),
            torch.func.vmap(gradients, in_dims)(*here),
            torch.func.grad(total, places)(*here),
            torch.autograd.grad(total(*leaves), leaves),
        )
        return torch.utils._pytree.tree_map(torch.Tensor.cpu, found)

    with variant.active():
        got = results(case.function, variant.device)
    torch.testing.assert_close(got, results(case.reference, "cpu"), **tolerance(dtype))


@on_every_kernel
def test_nested_vmap_also_in_inference_mode(case, variant):
    inputs = placed_inputs(case, variant, variant.widest, case.tiny[0])
    name, tensor = next(iter(tensors_of(inputs).items()))
    stacked = torch.stack([torch.stack([i * tensor, tensor - i]) for i in range(3)])

    def function(tensor):
        return outputs_of(case.function(**inputs | {name: tensor}))[0]

    with variant.active():
        expected = torch.stack([torch.stack([function(t) for t in row]) for row in stacked])
        nested = torch.func.vmap(torch.func.vmap(function))
        torch.testing.assert_close(nested(stacked), expected)
        with torch.inference_mode():
            torch.testing.assert_close(nested(stacked), expected)


# Compilers and modes


@on_every_variant
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(case, variant, dynamic):
    """Inductor where the kernel is compiled too; elsewhere tracing is what can go wrong."""
    torch.compiler.reset()

    def function(**inputs):
        outputs = outputs_of(case.function(**inputs))
        return tuple(out.relu() for out in outputs)

    compiler = "inductor" if variant.is_compiled else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    with variant.active():
        for shape in case.small if dynamic else case.small[:1]:
            inputs, grads = sample(case, shape)
            inputs = inputs_on(variant.device, inputs)
            grads = [placed(grad, variant.device) for grad in grads]
            expected = evaluate(function, inputs, grads)
            for name, value in evaluate(compiled, inputs, grads).items():
                torch.testing.assert_close(value, expected[name])


@on_every_kernel
def test_autocast_takes_the_activations_only(case, variant):
    inputs, grads = sample(case, case.small[0])
    half = {name: inputs[name].to(variant.half) for name in case.activations}
    half_grads = [grad.to(variant.half) for grad in grads]
    with variant.active():
        expected = run(case, variant, inputs | half, half_grads)
        with torch.autocast(variant.device, dtype=variant.half):
            got = run(case, variant, inputs, half_grads)
            if torch.float64 in variant.dtypes:
                double, _ = sample(case, case.small[0], torch.float64)
                assert run(case, variant, double)["out0"].dtype == torch.float64
    assert got["out0"].dtype == variant.half
    for name in tensors_of(inputs):
        assert got[f"grad {name}"].dtype == torch.float32
    assert_same_bits(
        {name: value.to(expected[name].dtype) for name, value in got.items()}, expected
    )


@on_compiled_kernels
def test_eight_threads_at_once(case, variant):
    samples = [sample(case, case.small[1], seed=seed) for seed in range(8)]
    results: dict[int, list] = {}

    def work(i: int) -> None:
        results[i] = [run(case, variant, *samples[i]) for _ in range(20)]

    with variant.active():
        expected = [run(case, variant, *each) for each in samples]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, wanted in enumerate(expected):
        assert len(results[i]) == 20
        for got in results[i]:
            assert_same_bits(got, wanted)


# Errors

BAD = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.bad]


def assert_refused(case, bad, inputs):
    with pytest.raises(bad.error) as caught:
        case.function(**inputs)
    assert re.match(bad.message, str(caught.value))


@pytest.mark.parametrize(("case", "name"), BAD)
def test_errors_name_argument_expected_and_got(case, name):
    inputs = case.make(case.small[0], torch.float32, generator(0))
    with dsnet_kernels.backend("reference"):
        assert_refused(case, case.bad[name], inputs | case.bad[name].change)


@on_every_variant
def test_errors_are_the_same_on_every_backend(case, variant):
    inputs = placed_inputs(case, variant)
    with variant.active():
        for bad in case.bad.values():
            assert_refused(case, bad, inputs | inputs_on(variant.device, bad.change))
