"""The command line: results on stdout, errors in one line on stderr, exit statuses."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

import dsnet
import dsnet_kernels
from dsnet import cli, commands
from dsnet.checkpoint import save_checkpoint
from dsnet.data import load_image, preprocess
from dsnet.macs import count_macs

COMMANDS = ("bench", "classify", "convert", "export", "info", "models", "profile")
RANDOM = ("--random-weights", "--size", "64")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three small photos, in the order of their names."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea.png", "coffee.png", "rocket.jpg"):
        image = Image.open(Path(skimage.data.__file__).parent / name)
        image.thumbnail((160, 160))
        image.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def inputs(photos):
    """What the network should get of the photos."""
    return torch.stack([preprocess(load_image(file), 64) for file in sorted(photos.iterdir())])


@pytest.fixture(scope="module")
def model(inputs):
    """A network of the public checkpoints' kind with 12 classes, none of them certain."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = dsnet.create_model("dsnet_tiny", num_classes=12, global_reduction=(8, 4, 2, 2))
        logits = model.eval()(inputs)
        model.head.weight /= logits.std()
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    """A checkpoint file of ``model``."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(model, path)
    return path


def classify(capsys, *arguments):
    """(exit status, JSON document, lines on stderr) of ``dsnet classify … --json``."""
    status = cli.main(["classify", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err.splitlines()


def error_of(capsys, *arguments):
    """The one line that a failing command writes, without any result."""
    assert cli.main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


# The frame around the commands


def test_commands_keep_their_interface():
    modules = commands.load()
    assert tuple(module.NAME for module in modules) == COMMANDS
    assert all(module.__name__ == f"dsnet.commands.{module.NAME}" for module in modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    assert cli.main([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: dsnet {command} ")
    assert "--debug" in captured.out
    assert captured.err == ""


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsnet {dsnet.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "dsnet: the following arguments are required: COMMAND (see dsnet --help)"),
        (("classify",), "dsnet classify: the following arguments are required: IMAGE"),
        (("models", "--size", "31"), "dsnet models: argument --size: expected an integer of at"),
        (("models", "--size", "x"), "dsnet models: argument --size: expected an integer of at"),
        (("models", "--global-reduction", "8", "4"), "dsnet models: argument --global-reduction: "),
        (("profile", "dsnet_huge"), "dsnet profile: argument MODEL: invalid choice: 'dsnet_huge'"),
        (("profile", "dsnet_tiny", "--dtype", "int8"), "dsnet profile: argument --dtype: invalid"),
        (("profile", "dsnet_tiny", "--batch", "0"), "dsnet profile: argument --batch: expected an"),
        (("profile", "dsnet_tiny", "--device", "toaster"), "dsnet profile: --device: cannot use"),
        (("classify", "x", "--topk", "0"), "dsnet classify: argument --topk: expected an integer"),
        (("classify", "x", "--model", "dsnet_huge"), "dsnet classify: argument --model: invalid"),
        (("classify", "x", "--weights", "w", "--random-weights"), "dsnet classify: argument --ran"),
        (("classify", "x", *RANDOM, "--topk", "1001"), "dsnet classify: --topk: expected at most"),
        (("classify", "x", *RANDOM, "--backend", "gpu"), "dsnet classify: backend: expected one"),
        (("classify", "x", *RANDOM, "--device", "toaster"), "dsnet classify: --device: cannot use"),
        (("classify", "x", *RANDOM, "--device", "cuda:99"), "dsnet classify: --device: "),
    ],
)
def test_wrong_arguments(capsys, arguments, line):
    lines = capture_lines(capsys, arguments)
    assert lines[-1].startswith(line)
    assert all(line.endswith("the predictions mean nothing") for line in lines[:-1])


def capture_lines(capsys, arguments):
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("size: expected 3,\n  got 4"), "size: expected 3, got 4"),
        (TypeError("x: expected a Tensor"), "x: expected a Tensor"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "No such file or directory", "w.pth"), "w.pth: No such file or dire"),
        (ImportError("needs Pillow"), "needs Pillow"),
        (dsnet.CheckpointError("w.pth", "foreign"), "w.pth: foreign"),
        (dsnet_kernels.BackendUnavailable("no GPU"), "no GPU"),
    ],
)
def test_expected_error_is_one_line(capsys, monkeypatch, error, message):
    def fail(args):
        raise error

    monkeypatch.setattr("dsnet.commands.info.run", fail)
    assert error_of(capsys, "info").startswith(f"dsnet info: {message}")
    for arguments in (["--debug", "info"], ["info", "--debug"]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_error_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr("dsnet.commands.info.run", lambda args: {}["key"])
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_interrupt_is_quiet(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsnet.commands.info.run", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


def process(*arguments, **environment):
    command = [sys.executable, "-m", "dsnet", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, env=os.environ | environment, **options)


def test_module_runs_as_a_process():
    done = process("classify", "absent.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dsnet classify: expected --weights FILE")


def test_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "dsnet", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141


# classify


def top(document):
    """The predicted indices of each image."""
    return [[p["index"] for p in image["predictions"]] for image in document["images"]]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--batch", 1),
        ("--batch", 2),
        ("--model", "dsnet_tiny"),
        ("--dtype", "float64"),
        ("--backend", "reference"),
        ("--backend", "cpu,reference"),
        ("--backend", " cpu, reference"),
    ],
)
def test_classify_gives_the_networks_probabilities(capsys, photos, inputs, model, weights, options):
    arguments = (photos, "--weights", weights, "--size", 64, "--topk", 4, *options)
    status, document, warnings = classify(capsys, *arguments)
    assert (status, document["errors"], warnings) == (0, [], [])
    files = [image["file"] for image in document["images"]]
    assert files == list(map(str, sorted(photos.iterdir())))
    with torch.no_grad():
        expected = model(inputs).softmax(dim=1).topk(4)
    assert top(document) == expected.indices.tolist()
    for image, values in zip(document["images"], expected.values.tolist(), strict=True):
        actual = [prediction["probability"] for prediction in image["predictions"]]
        assert actual == pytest.approx(values, abs=1e-4)
        assert all(prediction["label"] is None for prediction in image["predictions"])
    assert dsnet_kernels.current_backend() == ("auto",)


def test_classify_shows_no_more_predictions_than_classes(capsys, photos, model, tmp_path):
    pair = dsnet.create_model("dsnet_tiny", num_classes=2)
    save_checkpoint(pair, tmp_path / "pair.safetensors")
    arguments = (photos / "coffee.png", "--weights", tmp_path / "pair.safetensors", "--size", 64)
    _, document, _ = classify(capsys, *arguments)
    assert sorted(top(document)[0]) == [0, 1]


def test_classify_at_224_pixels(capsys, photos, weights, model):
    _, document, _ = classify(capsys, photos / "coffee.png", "--weights", weights, "--topk", 1)
    with torch.no_grad():
        logits = model(preprocess(load_image(photos / "coffee.png"))[None])
    assert top(document) == [[int(logits.argmax())]]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, ("--model", "dsnet_small"), "expected dsnet_small, got dsnet_tiny"),
        (b"not weights", (), ""),
    ],
)
def test_classify_with_unfit_weights(capsys, photos, weights, tmp_path, content, options, message):
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights.read_bytes() if content is None else content)
    line = error_of(capsys, "classify", photos, "--weights", path, *options)
    assert line.startswith(f"dsnet classify: {path}: {message}")


def test_classify_with_a_backbone(capsys, photos, tmp_path):
    path = tmp_path / "w.safetensors"
    save_checkpoint(dsnet.create_model("dsnet_tiny", num_classes=0), path)
    line = error_of(capsys, "classify", photos, "--weights", path)
    assert line == f"dsnet classify: {path}: expected a network with a classifier, got one without"


def test_random_weights_warn_and_repeat(capsys, photos):
    runs = [classify(capsys, photos, *RANDOM, "--topk", 1) for _ in range(2)]
    assert runs[0] == runs[1]
    status, document, warnings = runs[0]
    assert (status, len(document["images"])) == (0, 3)
    assert warnings == ["dsnet classify: random weights: the predictions mean nothing"]


def test_random_weights_leave_the_random_state_alone(capsys, photos):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    classify(capsys, photos / "coffee.png", *RANDOM)
    assert torch.rand(3).equal(expected)


def test_classify_other_variant(capsys, photos):
    arguments = (photos / "coffee.png", *RANDOM, "--topk", 1)
    _, tiny, _ = classify(capsys, *arguments)
    status, small, _ = classify(capsys, *arguments, "--model", "dsnet_small")
    assert status == 0
    assert tiny["images"] != small["images"]


def test_classify_text(capsys, photos, weights, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing {i}\n" for i in range(12)))
    file = photos / "coffee.png"
    arguments = (str(file), "--weights", str(weights), "--size", "64", "--labels", str(labels))
    _, document, _ = classify(capsys, *arguments)
    assert cli.main(["classify", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(file)
    for line, prediction in zip(lines[1:], document["images"][0]["predictions"], strict=True):
        index = prediction["index"]
        assert prediction["label"] == f"thing {index}"
        assert line.split() == [f"{prediction['probability']:.3%}", str(index), "thing", str(index)]
    assert len(lines) == 6


def test_one_bad_image_does_not_stop_the_rest(capsys, photos, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("not a photo")
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = (photos / "coffee.png", bad, tmp_path / "absent.png", empty, photos / "rocket.jpg")
    status, document, lines = classify(capsys, *arguments, *RANDOM, "--batch", 2)
    assert status == 1
    files = [image["file"] for image in document["images"]]
    assert files == [str(photos / "coffee.png"), str(photos / "rocket.jpg")]
    assert [error["file"] for error in document["errors"]] == list(map(str, arguments[1:4]))
    for error, line in zip(document["errors"], lines[1:], strict=True):
        assert line == f"dsnet classify: {error['file']}: {error['error']}"


def test_only_bad_images(capsys, tmp_path):
    status, document, _ = classify(capsys, tmp_path / "absent.png", *RANDOM)
    assert status == 1
    assert document["images"] == []
    assert document["errors"] == [
        {"file": str(tmp_path / "absent.png"), "error": "No such file or directory"}
    ]


def test_output_that_is_not_finite_is_an_error(capsys, photos, monkeypatch):
    create = dsnet.create_model

    def broken(*args, **kwargs):
        model = create(*args, **kwargs)
        torch.nn.init.constant_(model.head.bias, float("nan"))
        return model

    monkeypatch.setattr("dsnet.model.create_model", broken)
    status, document, _ = classify(capsys, photos / "coffee.png", *RANDOM)
    assert status == 1
    assert document["errors"][0]["error"] == "the network's output is not finite"


def test_classify_without_weights_refuses(capsys, photos):
    line = error_of(capsys, "classify", photos)
    assert line.startswith("dsnet classify: expected --weights FILE: without weights the predict")
    assert "--random-weights" in line


def test_classify_with_absent_weights(capsys, photos, tmp_path):
    line = error_of(capsys, "classify", photos, "--weights", tmp_path / "absent.pth")
    assert line.startswith(f"dsnet classify: {tmp_path / 'absent.pth'}: ")


def test_classify_without_pillow(capsys, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    lines = capture_lines(capsys, ["classify", str(photos), *RANDOM])
    assert lines[-1].startswith("dsnet classify: reading images needs Pillow: pip install ")


def test_classify_prints_any_file_name(photos, tmp_path):
    path = tmp_path / "caf\udce9 ☕.png"
    path.write_bytes((photos / "coffee.png").read_bytes())
    done = process("classify", str(path), *RANDOM, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("caf\\udce9 \\u2615.png")


# Labels

NAMES = ["apple", "Birne 🍐", "cat"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "apple\nBirne 🍐\ncat"),
        ("x.txt", "\ufeffapple\r\nBirne 🍐\r\ncat\r\n\n"),
        ("x.json", json.dumps(NAMES)),
        ("x.JSON", json.dumps({"2": "cat", "0": "apple", "1": "Birne 🍐"})),
    ],
)
def test_labels(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert commands.classify.read_labels(str(tmp_path / name), 3) == NAMES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"apple\ncat\n", "expected 3 labels, one per class, got 2"),
        ("x.txt", b"", "expected 3 labels, one per class, got 0"),
        ("x.txt", b"\xff\xfe\x00", "not a file of labels"),
        ("x.json", b"[", "not a file of labels"),
        ("x.json", b'["apple", "cat", 3]', "expected a list of strings"),
        ("x.json", b'"abc"', "expected a list of strings"),
        ("x.json", b'{"1": "apple", "2": "pear", "3": "cat"}', "expected the keys 0 to 2"),
    ],
)
def test_wrong_labels(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        commands.classify.read_labels(str(path), 3)


def test_wrong_number_of_labels_stops_classify(capsys, photos, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("apple\n")
    lines = capture_lines(capsys, ["classify", str(photos), *RANDOM, "--labels", str(labels)])
    assert lines[-1] == f"dsnet classify: {labels}: expected 1000 labels, one per class, got 1"


# info and models


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["operations"]["depthwise_conv3x3"]["reference"] is None
    assert set(facts["optional"]) == {"pillow", "timm"}
    assert facts["optional"]["pillow"] == metadata.version("pillow")
    assert cli.main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", torch.__version__] in lines
    assert ["pillow", metadata.version("pillow")] in lines


def test_info_of_an_absent_package(capsys, monkeypatch):
    monkeypatch.setattr("dsnet.commands.info.OPTIONAL", ("dsnet-no-such-package",))
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optional"] == {"dsnet-no-such-package": None}
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.endswith("  dsnet-no-such-package not installed\n")


def test_models_json(capsys):
    options = ("--size", "64", "--global-reduction", "8", "4", "2", "2")
    assert cli.main(["models", "--json", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["size"], facts["global_reduction"]) == (64, [8, 4, 2, 2])
    parameters = {row["name"]: row["parameters"] for row in facts["models"]}
    expected = {"dsnet_tiny": 10534312, "dsnet_small": 23004552, "dsnet_base": 49343752}
    assert parameters == expected
    tiny = dsnet.create_model("dsnet_tiny", global_reduction=(8, 4, 2, 2), device="meta").eval()
    assert facts["models"][0]["macs"] == count_macs(tiny, 64)


def test_models_text(capsys, monkeypatch):
    monkeypatch.setattr("dsnet.macs.count_macs", lambda model, size: 10**6 * size)
    assert cli.main(["models", "--size", "1234"]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "1234×1234 pixels, global reduction 8, 4, 2, 1"
    assert [row.split()[0] for row in rows] == dsnet.list_models()
    assert rows[0].split() == ["dsnet_tiny", "2,", "2,", "4,", "1", "10,534,312", "1.234"]
