"""``dsnet export``: files for other runtimes, checked before they appear."""

import dataclasses
import sys

import pytest
import torch
from small_network import images, small

import dsnet
import dsnet_kernels
from dsnet import cli, export
from dsnet.commands import export as command
from dsnet.model import DSNetFeatures
from dsnet.variants import Variant
from dsnet_kernels.backends import OPERATIONS

SMALLEST = Variant(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
"""A block of each stage, with heads that the kernels take: exporters are slow."""

KERNELS = ["cpu", "reference"]
"""Every operation on its kernel, where there is one, however small."""

SIZE = (64, 96)


def smallest(**kwargs):
    return small(variant=SMALLEST, **({"dtype": torch.float32} | kwargs))


def photos(batch, dtype=torch.float32):
    return images(*SIZE, batch=batch, dtype=dtype, seed=batch)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return smallest().requires_grad_(False)


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} (extra export) is not installed")
    reason = "onnxruntime (extra export) is not installed"
    return pytest.importorskip("onnxruntime", reason=reason)


def test_onnx_file_takes_any_batch(onnxruntime, model, tmp_path):
    import onnx

    path = tmp_path / "small.onnx"
    assert 0 < dsnet.export_model(model, path, size=SIZE) <= 1
    assert [each.name for each in tmp_path.iterdir()] == ["small.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (logits,) = session.run(["logits"], {"images": photos(batch).numpy()})
        close(torch.from_numpy(logits), model(photos(batch)))
    assert {node.domain for node in onnx.load(path).graph.node} == {""}


def test_onnx_backbone_has_an_output_per_map(onnxruntime, tmp_path):
    path = tmp_path / "maps.onnx"
    backbone = smallest(cls=DSNetFeatures, out_indices=(0, 2))
    dsnet.export_model(backbone, path, size=SIZE, batch=1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["map0", "map1"]
    found = session.run(None, {"images": photos(1).numpy()})
    for got, expected in zip(found, backbone(photos(1)), strict=True):
        close(torch.from_numpy(got), expected)


@pytest.mark.parametrize("backend", ["reference", KERNELS], ids=["reference", "kernels"])
def test_torch_file_takes_any_batch(backend, model, tmp_path):
    path = tmp_path / "small.pt2"
    with dsnet_kernels.backend(backend):
        dsnet.export_model(model, path, size=SIZE)
    program = torch.export.load(path)
    for batch in (1, 4):
        close(program.module()(photos(batch)), model(photos(batch)))
    targets = {str(node.target) for node in program.graph.nodes}
    own = {target.split(".")[1] for target in targets if target.startswith("dsnet_kernels.")}
    has_kernels = backend is KERNELS and "cpu" in dsnet_kernels.available_backends()
    assert own == (set(OPERATIONS) if has_kernels else set())


def test_package_ahead_of_time_takes_any_batch(model, tmp_path):
    path = tmp_path / "small.pt2"
    with dsnet_kernels.backend(KERNELS):
        dsnet.export_model(model, path, format="aoti", size=SIZE)
    package = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 4):
        close(package(photos(batch)), model(photos(batch)))


def writes(monkeypatch, outputs):
    """In place of ``torch.export``: a file whose outputs are those of the network, changed."""

    def write(network, path, images, any_batch):
        path.write_bytes(b"new")
        return lambda images: [outputs(network(images))]

    kind = dataclasses.replace(export.FORMATS["torch"], write=write)
    monkeypatch.setitem(export.FORMATS, "torch", kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checked_file_replaces_the_old_one(dtype, tmp_path, monkeypatch):
    writes(monkeypatch, lambda logits: logits)
    path = tmp_path / "small.pt2"
    path.write_bytes(b"old")
    model = smallest(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dsnet.export_model(model.train(), path, size=SIZE, overwrite=True)
    assert path.read_bytes() == b"new"
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda logits: logits * 0, id="zeros"),
        pytest.param(lambda logits: logits * 1.001, id="scaled"),
        pytest.param(lambda logits: logits.flip(1), id="swapped"),
        pytest.param(lambda logits: logits[:2], id="a traced batch"),
        pytest.param(lambda logits: logits / 0, id="not finite"),
    ],
)
def test_wrong_file_does_not_appear(wrong, model, tmp_path, monkeypatch):
    writes(monkeypatch, wrong)
    path = tmp_path / "small.pt2"
    path.write_bytes(b"old")
    with pytest.raises(dsnet.ExportError, match=r"small\.pt2: not written: .* logits: "):
        dsnet.export_model(model, path, size=SIZE, overwrite=True)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["small.pt2"]


def test_failing_exporter_is_told_in_a_line(model, tmp_path, monkeypatch):
    def write(network, path, images, any_batch):
        path.write_bytes(b"half")
        try:
            raise ValueError("no such operator\nadvice")
        except ValueError as error:
            raise RuntimeError("pages of advice") from error

    kind = dataclasses.replace(export.FORMATS["torch"], write=write)
    monkeypatch.setitem(export.FORMATS, "torch", kind)
    message = r"small\.pt2: no torch export: ValueError: no such operator$"
    with pytest.raises(dsnet.ExportError, match=message):
        dsnet.export_model(model, tmp_path / "small.pt2", size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_file_that_does_not_run_does_not_appear(model, tmp_path, monkeypatch):
    def refuse(logits):
        if len(logits) != export.TRACED_BATCH:
            raise RuntimeError("batch: expected 2")
        return logits

    writes(monkeypatch, refuse)
    message = (
        r"small\.pt2: not written: the file fails on 1 images: RuntimeError: batch: expected 2$"
    )
    with pytest.raises(dsnet.ExportError, match=message):
        dsnet.export_model(model, tmp_path / "small.pt2", size=SIZE)
    assert list(tmp_path.iterdir()) == []
    dsnet.export_model(model, tmp_path / "small.pt2", size=SIZE, batch=export.TRACED_BATCH)
    assert [each.name for each in tmp_path.iterdir()] == ["small.pt2"]


def test_absent_package_is_named_with_its_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = r"format onnx needs onnx \(.*\): pip install 'dsnet-kernels\[export\]'"
    with pytest.raises(ImportError, match=message):
        dsnet.export_model(model, tmp_path / "small.onnx")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "x.pth"}, ValueError, "path: expected a name ending in .onnx or .pt2, got 'x"),
        ({"path": "x.onnx", "format": "aoti"}, ValueError, "ending in .pt2 for format aoti, got"),
        ({"format": "tflite"}, ValueError, "format: expected one of onnx, torch, aoti, got 'tfl"),
        ({"size": (31, 64)}, ValueError, r"size: expected .* at least 32, got \(31, 64\)"),
        ({"batch": 0}, ValueError, "batch: expected at least 1 or None, got 0"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model: expected a DSNet, got Linear"),
        ({"path": "no/x.pt2"}, FileNotFoundError, "expected an existing folder"),
        ({"path": "folder.pt2"}, IsADirectoryError, "expected a file to write, got a folder"),
        ({"path": "old.pt2"}, FileExistsError, "exists already"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pt2").write_bytes(b"old")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=message):
        dsnet.export_model(**({"model": model, "path": "x.pt2"} | arguments))
    assert (tmp_path / "old.pt2").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("path", "dtype", "message"),
    [
        ("x.onnx", torch.bfloat16, "expected float32, float16 for format onnx, got torch.bfloat16"),
        ("x.pt2", torch.float16, "expected float32, bfloat16, float64 for format torch, got"),
    ],
)
def test_dtypes_of_a_format(path, dtype, message, tmp_path):
    with pytest.raises(TypeError, match=f"model: {message}"):
        dsnet.export_model(smallest(dtype=dtype), tmp_path / path)


# The command


@pytest.fixture
def exported(monkeypatch):
    """The arguments that the command gives to ``export_model``."""
    calls = []

    def export_model(*args, **kwargs):
        calls.append((*args, kwargs))
        return 0.25

    monkeypatch.setattr(export, "export_model", export_model)
    return calls


def test_command_exports_a_checkpoint(exported, tmp_path, capsys):
    weights = tmp_path / "tiny.safetensors"
    source = dsnet.create_model("dsnet_tiny", num_classes=3, global_reduction=(8, 4, 2, 2))
    dsnet.save_checkpoint(source, weights)
    arguments = ["--weights", str(weights), "--size", "64x96", "--batch", "2", "--force"]
    options = ["--format", "aoti", "--dtype", "bfloat16"]
    assert cli.main(["export", "dsnet_tiny", "out.pt2", *arguments, *options]) == 0
    ((model, path, kwargs),) = exported
    assert (path, model.global_reduction) == ("out.pt2", (8, 4, 2, 2))
    assert torch.equal(model.head.weight, source.head.weight.bfloat16())
    assert kwargs == {"format": "aoti", "size": (64, 96), "batch": 2, "overwrite": True}
    assert capsys.readouterr().out == (
        "wrote out.pt2: dsnet_tiny, bfloat16, batch 2, 64×96 pixels\n"
        "checked against eager PyTorch: error 0.25 of what is allowed\n"
    )


def test_command_without_weights_says_so(exported, capsys):
    for _ in range(2):
        assert cli.main(["export", "dsnet_tiny", "out.onnx"]) == 0
    (first, _, kwargs), (second, _, _) = exported
    assert torch.equal(first.head.weight, second.head.weight)
    assert kwargs == {"format": None, "size": (224, 224), "batch": None, "overwrite": False}
    captured = capsys.readouterr()
    assert "any batch, 224×224 pixels" in captured.out
    assert captured.err == 2 * "dsnet export: random weights: the predictions mean nothing\n"


def test_choices_of_the_command_are_the_formats():
    assert tuple(export.FORMATS) == command.FORMATS
    dtypes = {dtype for kind in export.FORMATS.values() for dtype in kind.dtypes}
    assert {getattr(torch, name) for name in command.DTYPES} == dtypes
