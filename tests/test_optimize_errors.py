"""What dsnet.optimize and optimised networks refuse, with strict and without."""

import re

import pytest
import torch
from small_network import images, randomise, small
from torch import nn

import dsnet
from dsnet.checkpoint import save_checkpoint
from dsnet.optimized import OptimizedDSNet
from dsnet_kernels import BackendUnavailable, native


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def network(dtype=torch.float64, **kwargs):
    return randomise(small(**kwargs)).to(dtype)


# strict


@pytest.mark.parametrize("backend", ["auto", "cpu", None])
def test_strict_names_block_operation_and_reason(backend):
    model = nn.Sequential(nn.Identity(), dsnet.DSBlock(16, 2, 2)).half()
    message = (
        r"^1: depthwise_conv3x3: no requested backend can run: cpu: (x is torch.float16|.* not)"
    )
    with pytest.raises(BackendUnavailable, match=message):
        dsnet.optimize(model, backend=backend, strict=True)
    assert dsnet.optimize(model).module[1].name == "1"


def test_strict_without_any_kernel_backend_is_refused():
    with pytest.raises(
        ValueError, match="backend: expected one with kernels where strict, got 're"
    ):
        dsnet.optimize(network(), backend="reference", strict=True)


needs_kernels = pytest.mark.skipif(native.CPU.refusal is not None, reason="needs the CPU's library")


@needs_kernels
def test_strict_accepts_a_network_whose_operations_all_have_kernels():
    model, x = network(torch.float32), images(dtype=torch.float32)
    strict = dsnet.optimize(model, strict=True)
    assert torch.equal(strict(x), dsnet.optimize(model)(x))


@needs_kernels
def test_strict_refuses_a_block_of_one_stream():
    model = network(torch.float32, alpha=1.0)
    message = r"stages\.0\.blocks\.0: upsample_concat: .* cpu: local is empty"
    with pytest.raises(BackendUnavailable, match=message):
        dsnet.optimize(model, strict=True)


@needs_kernels
def test_strict_raises_in_the_call_where_the_input_decides():
    optimized = dsnet.optimize(network(torch.float32), strict=True).half()
    with pytest.raises(BackendUnavailable, match=r"^stages\.0\.blocks\.0: depthwise_conv3x3: "):
        optimized(images(dtype=torch.float16))


def test_a_named_backend_that_cannot_run_names_the_block():
    optimized = dsnet.optimize(network(torch.float16), backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"^stages\.0\.blocks\.0: depthwise_conv3x3: "):
        optimized(images(dtype=torch.float16))


# Errors


class OwnForward(dsnet.DSBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def batch_statistics():
    model = network()
    norm = model.stages[1].blocks[0].mlp.norm
    norm.running_mean = norm.running_var = None
    return model


def another_norm():
    model = network()
    model.stages[1].blocks[0].norm = nn.GroupNorm(1, 32)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (dict, TypeError, "model: expected a Module, got dict"),
        (lambda: nn.Linear(1, 1), ValueError, "model: expected a DSNet or another module with DSB"),
        (lambda: dsnet.optimize(network()), ValueError, "DSBlocks, got OptimizedDSNet"),
        (lambda: dsnet.DSBlock(8, 1, 1).to("meta"), ValueError, "model: expected parameters with"),
        (lambda: OwnForward(8, 1, 1), TypeError, "own forward in OwnForward, got that of OwnForw"),
        (batch_statistics, ValueError, "to fold, got none in stages.1.blocks.0.mlp.norm, which"),
        (another_norm, TypeError, "model: cannot fold stages.1.blocks.0.norm: norm: expected"),
    ],
)
def test_wrong_models_are_refused(make, error, message):
    model = make()
    with pytest.raises(error, match=re.escape(message)):
        dsnet.optimize(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "float32"])
def test_wrong_dtypes_are_refused(dtype):
    message = re.escape(f"dtype: expected float32, float64, bfloat16 or None on cpu, got {dtype}")
    with pytest.raises(TypeError, match=message):
        dsnet.optimize(network(), dtype=dtype)


@pytest.mark.parametrize("backend", ["gpu", ["cpu", "gpu"], []])
@pytest.mark.parametrize("strict", [True, False])
def test_wrong_backends_are_refused(backend, strict):
    with pytest.raises(ValueError, match="backend: expected one or more of auto, reference, "):
        dsnet.optimize(network(), backend=backend, strict=strict)


@pytest.mark.parametrize("graphs", [-1, 1.5, None])
def test_wrong_counts_of_graphs_are_refused(graphs):
    with pytest.raises(ValueError, match="graphs: expected a count, 0 for none, got"):
        dsnet.optimize(network(), graphs=graphs)


@pytest.mark.parametrize("inner", [False, True])
def test_training_is_refused_and_evaluation_is_not(inner):
    optimized = dsnet.optimize(network())
    module = optimized.module.stages[0].blocks[0] if inner else optimized
    with pytest.raises(RuntimeError, match="for inference only, its norms are folded; train the"):
        module.train()
    assert not any(each.training for each in optimized.modules())
    assert module.eval() is module


@pytest.mark.parametrize(
    "name", ["reset_classifier", "prune_intermediate_layers", "set_grad_checkpointing"]
)
def test_changes_of_the_network_come_before(name):
    optimized = dsnet.optimize(network())
    assert isinstance(optimized, OptimizedDSNet)
    with pytest.raises(AttributeError, match=f"{name}: do it before dsnet.optimize"):
        getattr(optimized, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = optimized.no_such_name


def test_checkpoints_hold_no_folded_weights(tmp_path):
    with pytest.raises(TypeError, match=r"got one optimised for inference, .* made from"):
        save_checkpoint(dsnet.optimize(network()), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
