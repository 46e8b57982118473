"""Other runtimes as baselines of ``dsnet bench``: stand-ins, and the real ones where installed."""

import dataclasses
import io
import sys

import pytest
import torch
from small_network import images, small

import dsnet
from dsnet import export
from dsnet.bench import models, packages, peers, table
from dsnet.bench.peers import PEERS, Peer
from dsnet.bench.report import Report
from dsnet.bench.timing import Timing
from dsnet.commands import bench

BASELINES = ["eager_nchw", "eager_channels_last", "onnxruntime", "openvino"]


@pytest.fixture
def standing_in(monkeypatch):
    """Replaces what a peer's package does; the network goes by ``torch.save``, not as ONNX."""

    def reference_onnx(problem):
        file = io.BytesIO()
        torch.save((problem.name, problem.rounded(), tuple(problem.images.shape)), file)
        return file.getvalue()

    def replace(name, outputs, package="torch"):
        def load(model, dtype, threads):
            name, state, shape = torch.load(io.BytesIO(model))
            network = dsnet.create_model(name, backend="reference").eval()
            network.load_state_dict(state)

            def run(images):
                assert (tuple(images.shape), images.dtype) == (shape, torch.float32)
                assert threads == torch.get_num_threads()
                return [outputs(network(images))]

            return run

        dtypes = PEERS[name].dtypes
        monkeypatch.setitem(PEERS, name, Peer(package, dtypes, load))

    monkeypatch.setattr(peers, "EXPORT_PACKAGES", ())
    monkeypatch.setattr(peers, "reference_onnx", reference_onnx)
    return replace


def row(dtype=torch.float32, training=False, baselines=BASELINES, exported=()):
    """A row whose contenders all take a second."""
    return models.model_row(
        "dsnet_tiny",
        batch=2 if training else 1,
        size=(32, 32),
        dtype=dtype,
        training=training,
        backends=["reference"],
        baselines=baselines,
        exported=exported,
        timer=lambda calls, budget, **limits: {name: Timing((1.0,), 1) for name in calls},
    )


def rendered(*rows):
    machine = {"cpu": "CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2}
    return table.render(Report(machine, {}, None, "2000-01-01", "dsnet bench", 1.0, rows))


def test_peers_are_checked_and_timed_as_the_others(standing_in):
    for name in PEERS:
        standing_in(name, lambda logits: logits)
    result = row()
    for name in PEERS:
        found = result.result(name)
        assert (found.role, found.problem, found.median) == ("baseline", None, 1.0)
        assert found.error <= 1
        assert found.compile_seconds > 0
    text = rendered(result)
    assert "ONNX RT" in text
    assert "OpenVINO" in text
    assert "left out" not in text


def test_peer_that_is_wrong_or_rounds_to_bfloat16_is_not_compared_with(standing_in):
    standing_in("onnxruntime", lambda logits: logits * 1.01)
    standing_in("openvino", lambda logits: logits.bfloat16().float())
    result = row(baselines=list(PEERS))
    for name in PEERS:
        assert result.result(name).problem.startswith("check failed: logits: ")
    assert result.best is None


def test_peer_that_cannot_load_is_told(standing_in):
    def fail(logits):
        raise RuntimeError("no kernel for Gelu")

    standing_in("openvino", fail)
    result = row(baselines=["openvino"])
    assert "openvino, 1 images, inference: RuntimeError: no kernel for Gelu" in rendered(result)
    assert not result.failed()


def test_row_in_bfloat16_has_the_peers_that_compute_in_it(standing_in):
    for name in PEERS:
        standing_in(name, lambda logits: logits)
    result = row(torch.bfloat16)
    assert result.result("openvino").problem is None
    assert result.result("onnxruntime") is None
    expected = "onnxruntime is left out: it computes in float32 here, not in bfloat16"
    assert expected in rendered(result)


def test_training_is_without_peers():
    result = row(training=True)
    assert {each.name for each in result.results} == {*BASELINES[:2], "reference"}
    text = rendered(result)
    for name in PEERS:
        assert f"{name} is left out of training" in text


@pytest.mark.parametrize("absent", ["onnxscript", "openvino"])
def test_absent_package_is_named_with_its_extra(absent, monkeypatch):
    needed = ("onnxscript",) if absent == "onnxscript" else ()
    monkeypatch.setattr(peers, "EXPORT_PACKAGES", needed)
    monkeypatch.setitem(sys.modules, absent, None)
    reason = peers.refusal("openvino", torch.float32, "cpu")
    assert reason.startswith(f"it needs {absent} (")
    assert reason.endswith("): pip install 'dsnet-kernels[peers]'")


def test_peers_run_on_the_cpu_alone():
    reason = "it runs on the CPU, not on cuda:0"
    assert peers.refusal("openvino", torch.float32, "cuda:0") == reason


def test_command_and_table_know_the_peers():
    assert set(PEERS) < set(table.BASELINES)
    assert bench._baselines(["all"]) == list(bench.BASELINES.values())
    assert set(bench._baselines(["all"])) == set(table.BASELINES) - {"native"}
    assert bench._baselines(["nchw", "openvino"]) == ["eager_nchw", "openvino"]
    assert bench._baselines(None) is None


def test_versions_of_the_peers_named(monkeypatch):
    monkeypatch.setitem(PEERS, "openvino", dataclasses.replace(PEERS["openvino"], package="absent"))
    monkeypatch.setitem(
        PEERS, "onnxruntime", dataclasses.replace(PEERS["onnxruntime"], package="pytest")
    )
    assert peers.versions(["eager_nchw", *PEERS]) == {"pytest": pytest.__version__}
    assert peers.versions(["eager_nchw"]) == {}


# Packages of ours


def packaged(monkeypatch, outputs, **arguments):
    """A row with packages that compute ``outputs`` of our network's logits."""

    def write(network, path, images, any_batch):
        assert path.parent.is_dir()
        assert not any_batch
        return lambda images: [outputs(network(images))]

    kinds = {
        name: dataclasses.replace(export.FORMATS[name], write=write) for name in export.FORMATS
    }
    monkeypatch.setattr(packages, "FORMATS", kinds)
    return row(baselines=["eager_nchw"], exported=list(packages.PACKAGES), **arguments)


def test_packages_are_checked_and_timed_as_ours(monkeypatch):
    result = packaged(monkeypatch, lambda logits: logits)
    found = {each.name: each for each in result.ours()}
    assert set(found) == {"reference", "auto, torch.export", "auto, aoti"}
    for each in found.values():
        assert (each.problem, each.median, each.ratio) == (None, 1.0, 1.0)
    assert found["auto, aoti"].compile_seconds > 0
    assert "auto, aoti→" in rendered(result)


def test_package_that_is_wrong_fails_the_row(monkeypatch):
    result = packaged(monkeypatch, lambda logits: logits * 1.01)
    assert result.failed()
    assert "ours auto, aoti, 1 images, inference: check failed: logits" in rendered(result)


def test_packages_are_left_out_of_training_and_of_dtypes_they_do_not_take(monkeypatch):
    result = packaged(monkeypatch, lambda logits: logits, training=True)
    assert {each.name for each in result.ours()} == {"reference"}
    assert "aoti is left out of training" in rendered(result)
    reason = packages.refusal("aoti", torch.float16)
    assert reason == "it computes in float32 and bfloat16 and float64, not in float16"


# The real ones


@pytest.fixture(scope="module")
def network():
    return small(dtype=torch.float32)


@pytest.fixture(scope="module")
def onnx(network):
    for package in peers.EXPORT_PACKAGES:
        pytest.importorskip(package, reason=f"{package} (extra peers) is not installed")
    return export.onnx_bytes(network, images(dtype=torch.float32))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_installed_peer_computes_the_network_in_the_rows_dtype(name, dtype, network, onnx):
    if dtype not in PEERS[name].dtypes:
        assert peers.refusal(name, dtype, "cpu").startswith("it computes in float32 here")
        return
    pytest.importorskip(PEERS[name].package, reason=f"{name} (extra peers) is not installed")
    x = images(dtype=dtype)
    contender = peers.contender(name, lambda: onnx, x)
    try:
        logits = contender.values()["logits"]
    except RuntimeError as error:
        # A processor without bfloat16.
        assert dtype is torch.bfloat16
        pytest.skip(str(error))
    assert logits.dtype == dtype
    expected = network(x.float()).detach()
    error = ((logits.float() - expected).norm() / expected.norm()).item()
    # OpenVINO's fused attention is good for five digits.
    low, high = {torch.float32: (0, 1e-4), torch.bfloat16: (1e-3, 5e-2)}[dtype]
    assert low < error < high
