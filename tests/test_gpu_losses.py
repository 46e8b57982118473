"""What ``auto`` passes over on a GPU since the reference is the faster; no GPU is needed."""

import pytest
import torch
from variants import OnDevice

import dsnet_kernels
from dsnet_kernels import native, triton
from dsnet_kernels.backends import OPERATIONS, select

PRODUCT = {
    "global_attention": "matmul",
    "co_attention": "matmul",
    "upsample_concat": "conv",
    "pointwise_mlp": "conv",
}
"""The kind of torch's products in the reference of an operation."""

TF32 = "torch's flags allow TF32 in the reference's products"
MEASURED = "predicted to be slower"


def flags_of(product):
    return torch.backends.cudnn.conv if product == "conv" else torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Both backends run on the GPU; the flags are restored."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "cuda_versions", lambda: None)
    monkeypatch.setattr(native, "build_record", lambda: None)
    monkeypatch.setattr(triton, "import_refusal", lambda: None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for operation in OPERATIONS.values():
        for name in ("cuda", "triton"):
            monkeypatch.setitem(operation.present, name, lambda: None)
    before = {product: flags_of(product).fp32_precision for product in ("conv", "matmul")}
    yield
    for product, value in before.items():
        flags_of(product).fp32_precision = value


def operands(name, dtype, channels=64):
    shapes = {
        "x": (2, 49, channels) if name == "global_attention" else (2, channels, 14, 14),
        "fc1_weight": (4 * channels, channels),
        "local": (2, channels, 14, 14),
        "global_": (2, 49, channels) if name == "co_attention" else (2, channels, 7, 7),
    }
    tensors = [OnDevice("cuda", shapes[tensor]) for tensor in OPERATIONS[name].tensors]
    for tensor in tensors:
        tensor.dtype = dtype
    return tensors


@pytest.mark.parametrize("name", PRODUCT)
def test_float32_is_the_reference_s_where_torch_may_take_tf32(name):
    operation, tensors = OPERATIONS[name], operands(name, torch.float32)
    fallback = "sdpa" if "attention" in name else "reference"
    flags, other = flags_of(PRODUCT[name]), {"conv": "matmul", "matmul": "conv"}[PRODUCT[name]]
    flags_of(other).fp32_precision = "ieee"
    flags.fp32_precision = "tf32"
    assert select(operation, "auto", *tensors) == fallback
    for backend in ("cuda", "triton"):
        reason = operation.reason_to_avoid(backend, *tensors)
        assert reason.startswith(TF32)
        assert MEASURED in reason
        assert select(operation, backend, *tensors) == backend
    flags_of(other).fp32_precision = "tf32"
    flags.fp32_precision = "ieee"
    expected = "triton" if name == "pointwise_mlp" else "cuda"
    assert select(operation, "auto", *tensors) == expected


@pytest.mark.parametrize("name", PRODUCT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_the_kernels_whatever_the_flags(name, dtype):
    for value in ("tf32", "ieee"):
        for product in ("conv", "matmul"):
            flags_of(product).fp32_precision = value
        assert select(OPERATIONS[name], "auto", *operands(name, dtype)) == "cuda"


def test_a_depthwise_convolution_is_bound_by_memory_whatever_the_flags():
    for value in ("tf32", "ieee"):
        torch.backends.cudnn.conv.fp32_precision = value
        operation = OPERATIONS["depthwise_conv3x3"]
        assert select(operation, "auto", OnDevice("cuda", (2, 64, 9, 9))) == "cuda"


def test_flags_by_default_and_by_their_older_names(monkeypatch):
    assert native.tf32_allowed("conv")
    assert not native.tf32_allowed("matmul")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = False, True
        assert not native.tf32_allowed("conv")
        assert native.tf32_allowed("matmul")
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
        assert native.tf32_allowed("conv")
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert not native.tf32_allowed("matmul")
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("channels", "expected"), [(64, "cuda"), (128, "cuda"), (320, "triton")])
def test_wide_mlps_pass_over_the_cuda_kernels(channels, expected):
    operation = OPERATIONS["pointwise_mlp"]
    tensors = operands("pointwise_mlp", torch.bfloat16, channels)
    assert select(operation, "auto", *tensors) == expected
    reason = operation.reason_to_avoid("cuda", *tensors)
    assert (reason is None) == (expected == "cuda")
    assert reason is None or "predicted to be slower than cuBLAS, not measured" in reason
    assert operation.reason_to_avoid("triton", *tensors) is None


def test_nothing_changes_on_the_cpu():
    x, weight = torch.zeros(1, 320, 2, 2), torch.zeros(640, 320)
    for backend in ("cuda", "triton", "cpu"):
        assert OPERATIONS["pointwise_mlp"].reason_to_avoid(backend, x, weight) is None


def test_the_flags_are_constants_of_a_compiled_graph():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: x + int(native.tf32_allowed("conv")), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(())).item() == 1
    torch.compiler.reset()
    assert dsnet_kernels.current_backend() == ("auto",)
