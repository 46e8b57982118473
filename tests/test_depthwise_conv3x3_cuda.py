"""The CUDA kernels of ``depthwise_conv3x3``, run in the emulator."""

import emulated
import emulator_build
import pytest
import torch

from dsnet_kernels.reference import depthwise_conv3x3 as reference

forward, backward = emulated.functions("depthwise_conv3x3")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACK = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 6),
    (1, 8, 7, 1),
    (1, 17, 4, 3),
    (2, 33, 2, 2),
    (1, 64, 7, 7),
    (2, 64, 3, 5),
    (1, 136, 3, 2),
    (1, 130, 2, 3),
    (1, 64, 17, 19),
]
FULL = ("bias", "scale", "shift", "residual")


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("depthwise_conv3x3")


def make_inputs(shape, dtype, parameters=FULL, seed=0, integers=False, float32_parameters=True):
    """Tensors x, grad and the parameters of a call; those not named in ``parameters`` are None."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        if integers:
            return torch.randint(-3, 4, size, generator=generator).float()
        return torch.randn(size, generator=generator)

    batch, channels, height, width = shape
    parameter_dtype = torch.float32 if float32_parameters else dtype
    x = random(batch, height, width, channels).to(dtype).permute(0, 3, 1, 2)
    grad = random(batch, height, width, channels).to(dtype).permute(0, 3, 1, 2)
    values = {
        "weight": random(channels, 1, 3, 3),
        "bias": random(channels),
        # Powers of two keep integers exact.
        "scale": 2.0 ** torch.randint(-1, 2, (channels,), generator=generator),
        "shift": random(channels),
    }
    arguments = {
        name: value.to(parameter_dtype) if name == "weight" or name in parameters else None
        for name, value in values.items()
    }
    return x, grad, arguments | {"residual": "residual" in parameters}


def without_bias(arguments):
    """What the backward takes of a forward's arguments."""
    return {name: value for name, value in arguments.items() if name != "bias"}


def oracle(x, grad, arguments, magnitude=False):
    """Output, grad_x and gradient rows in float64; ``magnitude``: of all absolute values."""

    def exact(tensor):
        if tensor is None:
            return None
        tensor = tensor.detach().double().contiguous()
        return (tensor.abs() if magnitude else tensor).requires_grad_()

    channels = x.shape[1]
    leaves = {
        "weight": exact(arguments["weight"]),
        "bias": exact(torch.zeros(channels) if arguments["bias"] is None else arguments["bias"]),
        "scale": exact(torch.ones(channels) if arguments["scale"] is None else arguments["scale"]),
        "shift": exact(torch.zeros(channels) if arguments["shift"] is None else arguments["shift"]),
    }
    x = exact(x)
    out = reference(x, **leaves, residual=arguments["residual"])
    grads = torch.autograd.grad(out, [x, *leaves.values()], exact(grad))
    rows = torch.cat([grads[1].reshape(channels, 9).t(), torch.stack(grads[2:])])
    return out.detach(), grads[0], rows


def assert_within_rounding(actual, exact, magnitude, terms):
    """Sums of ``terms`` fp32 roundings of what adds up to ``magnitude``, stored in one rounding."""
    limits = torch.finfo(actual.dtype)
    bound = limits.eps * exact.abs() + limits.tiny + terms * 2.0**-24 * magnitude
    excess = ((actual.double() - exact).abs() / bound).max() if actual.numel() else 0.0
    assert excess <= 1, f"{excess:.2f} times the rounding errors allowed"


def assert_correct(x, grad, arguments, **options):
    exact = oracle(x, grad, arguments)
    magnitude = oracle(x, grad, arguments, magnitude=True)
    out = forward(x, **arguments, **options)
    grad_x, rows = backward(grad, x, **without_bias(arguments), **options)
    for actual, *expected in zip((out, grad_x, rows), exact, magnitude, (16, 16, 32), strict=True):
        assert_within_rounding(actual, *expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_float64(shape, dtype):
    x, grad, arguments = make_inputs(shape, dtype)
    assert_correct(x, grad, arguments)


@pytest.mark.parametrize(
    "parameters",
    [(), ("bias",), ("scale",), ("shift",), ("residual",), ("scale", "shift"), FULL],
    ids=lambda names: "+".join(names) or "weight",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_parameters_and_parameters_in_the_dtype_of_x(parameters, dtype):
    inputs = make_inputs((1, 8, 5, 4), dtype, parameters, float32_parameters=False)
    assert_correct(*inputs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("channels", [16, 70])
def test_results_do_not_depend_on_the_order_of_threads(channels, seed):
    x, grad, arguments = make_inputs((2, channels, 9, 5), torch.bfloat16)
    fields = {"strips": 3, "rows": 3}
    assert torch.equal(
        forward(x, **arguments, seed=seed, **fields),
        forward(x, **arguments, seed=100, **fields),
    )
    results = backward(grad, x, **without_bias(arguments), seed=seed, **fields)
    expected = backward(grad, x, **without_bias(arguments), seed=100, **fields)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_strips_of_any_height_and_several_columns_per_thread(rows, dtype):
    x, grad, arguments = make_inputs((2, 64, 7, 21), dtype)
    fields = {"rows": rows, "strips": -(-7 // rows), "column_blocks": 2}
    assert_correct(x, grad, arguments, **fields)


def test_parameter_gradients_gather_more_blocks_than_a_thread_adds(emulator):
    x, grad, arguments = make_inputs((1, 8, 70, 2), torch.float32, integers=True)
    _, rows = backward(grad, x, **without_bias(arguments), strips=70, rows=1)
    assert torch.equal(rows, oracle(x, grad, arguments)[2].float())


def slices(dtype):
    """Name and tensor (1, 16, 4, 5) for layouts read in place: the packed and the scalar path."""
    generator = torch.Generator().manual_seed(5)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    yield "channels [8, 24) of 40", random(1, 4, 5, 40)[..., 8:24].permute(0, 3, 1, 2)
    yield "channels [3, 19) of 20", random(1, 4, 5, 20)[..., 3:19].permute(0, 3, 1, 2)
    yield "rows and columns inside", random(1, 8, 9, 16)[:, 2:6, 3:8].permute(0, 3, 1, 2)
    yield "every second column", random(1, 4, 10, 16)[:, :, ::2].permute(0, 3, 1, 2)
    yield "columns before rows", random(1, 5, 4, 16).permute(0, 3, 2, 1)
    yield "one row for all", random(1, 1, 5, 16).expand(1, 4, 5, 16).permute(0, 3, 1, 2)
    for offset in range(1, 8):
        flat = random(4 * 5 * 16 + 8)[offset : offset + 320]
        yield f"offset {offset}", flat.view(1, 4, 5, 16).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_offsets_are_read_in_place(dtype):
    names = set()
    for name, x in slices(dtype):
        _, grad, arguments = make_inputs((1, 16, 4, 5), dtype)
        assert_correct(x, grad, arguments)
        assert_correct(grad, x, arguments)
        names.add(name)
    assert len(names) == 13


@pytest.mark.parametrize(
    ("channels", "address", "packs"),
    [(64, 0, (8, 4)), (64, 8, (1, 4)), (64, 2, (1, 1)), (12, 0, (1, 4)), (17, 0, (1, 1))],
)
def test_packs_are_as_wide_as_channels_and_alignment_allow(emulator, channels, address, packs):
    found = emulator.launches((1, channels, 5, 5), emulator.Storage.bfloat16, address)
    assert tuple(launch.pack for launch in found) == packs


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (0, 64, 7, 7),
        (256, 64, 56, 56),
        (256, 512, 7, 7),
        (1, 320, 50, 83),
        (1, 136, 2**31 - 1, 1),
        (2**31, 33, 1, 65_537),
        (3, 2**33 + 8, 1, 1),
        (2**20, 2**13, 2**20, 2),
    ],
    ids=str,
)
def test_launches_cover_every_value_within_the_limits_of_a_grid(emulator, shape):
    batch, channels, height, width = shape
    for launch in emulator.launches(shape, emulator.Storage.bfloat16, 0):
        assert launch.threads_x * launch.threads_y <= launch.threads
        assert launch.threads_x * launch.pack <= 128
        assert launch.groups * launch.threads_x * launch.pack >= channels
        assert launch.strips * launch.rows >= height > (launch.strips - 1) * launch.rows
        assert launch.column_blocks * launch.threads_y * launch.repeats >= batch * width
        assert 1 <= launch.blocks < 2**31
        assert f"blocks {launch.blocks}" in launch.text


@pytest.mark.parametrize("shape", [(1, 8, 2**31, 1), (1, 8, 1, 2**31)], ids=str)
def test_more_rows_or_columns_than_an_int_holds_are_refused(emulator, shape):
    with pytest.raises(ValueError, match="x: expected at most 2147483647 rows and columns, got"):
        emulator.launches(shape, emulator.Storage.float32, 0)
