"""``python -m benchmarks ops``, ``models`` and ``scaling``: which rows, and small runs of them."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks.commands import models, ops, scaling
from dsnet.bench import cases
from dsnet.bench.report import Report
from dsnet.commands.bench import settings


def parse(*arguments):
    args = command._parser().parse_args(arguments)
    args.argv = list(arguments)
    return args


def run(tmp_path, *arguments):
    """Exit status and report of a command."""
    target = tmp_path / "record.json"
    status = command.main([*arguments, "--json", str(target)])
    return status, Report.from_json(target.read_text("utf-8"))


def titles(module, *arguments):
    args = parse(module.NAME, *arguments)
    return [task.title for task in module.chosen(args, settings(args))]


def test_operations_have_every_case_stage_pass_and_batch_against_every_baseline():
    args = parse("ops")
    common = settings(args)
    found = ops.chosen(args, common)
    assert len(found) == len(cases.CASES) * 4 * 2 * 2
    assert {task.run.args[1].batch for task in found} == {1, 8}
    assert set(common.baselines) > {"eager_nchw", "eager_channels_last", "compile", "sdpa"}


def test_operations_can_be_picked():
    found = titles(ops, "--op", "co_attention", "--stage", "1", "--batch", "2")
    assert found == [
        "co_attention exchange, stage 1, forward",
        "co_attention exchange, stage 1, forward+backward",
    ]


def test_networks_with_the_same_stages_are_measured_once_and_that_is_told(capsys):
    alone = titles(ops, "--model", "dsnet_tiny")
    assert titles(ops, "--model", "dsnet_tiny", "dsnet_base") == alone
    assert "dsnet_base: its stages are those of dsnet_tiny" in capsys.readouterr().err


def test_networks_have_inference_training_and_a_backbone():
    work = ["--work", "inference", "training", "backbone"]
    assert titles(models, "--model", "dsnet_small", *work) == [
        "dsnet_small inference, batch 1",
        "dsnet_small inference, batch 8",
        "dsnet_small training step, batch 8",
        "dsnet_small backbone, batch 1",
    ]


def test_every_peer_is_asked_for_by_name_or_all():
    everything = settings(parse("models", "--peers", "all")).baselines
    assert set(everything) == {
        *("eager_nchw", "eager_channels_last", "eager_amp", "compile", "sdpa"),
        *("onnxruntime", "openvino"),
    }
    assert settings(parse("models", "--peers", "openvino")).baselines == ["openvino"]


def test_missing_peer_is_named_with_the_reason(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["--work", "inference", "--batch", "1", "--size", "64"]
    arguments += ["--peers", "channels_last", "sdpa", "openvino"]
    status, found = run(tmp_path, "models", *arguments)
    assert status == 0
    printed = capsys.readouterr().out
    assert "openvino is left out: it needs " in printed
    assert "SDPA" in printed
    (row,) = found.rows
    assert {result.name for result in row.results} == {"eager_channels_last", "sdpa", "auto"}
    assert row.result("sdpa").chosen["co_attention"] == "sdpa"


def test_backbone_has_its_maps_checked_and_its_memory(quick, tmp_path, capsys):
    arguments = ["--work", "backbone", "--batch", "1", "--size", "64x96", "--peers", "nchw"]
    status, found = run(tmp_path, "models", *arguments)
    assert status == 0
    (row,) = found.rows
    assert (row.use, row.image) == ("backbone", (64, 96))
    assert all(result.problem is None and result.error <= 1 for result in row.ours())
    if sys.platform == "linux":
        assert all(result.peak_bytes is not None for result in row.results)
    assert "backbone" in capsys.readouterr().out


def test_one_operation_is_measured_with_the_roofs(quick, tmp_path, capsys):
    arguments = ["--op", "depthwise_conv3x3", "--stage", "4", "--batch", "1", "--size", "64"]
    arguments += ["--baselines", "channels_last", "--threads", "1"]
    status, found = run(tmp_path, "ops", *arguments)
    assert status == 0
    assert found.command == "python -m benchmarks ops " + " ".join(
        [*arguments, "--json", str(tmp_path / "record.json")]
    )
    assert [roof.name for roof in found.roofs] == ["copy", "copy in cache", "product"]
    assert len(found.rows) == 4
    assert "of roof" in capsys.readouterr().out


def test_scaling_is_one_record_of_all_curves(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SIZE", (64, 64))
    monkeypatch.setattr(scaling, "BATCH", 2)
    arguments = ["--batch", "1", "--size", "64", "--threads", "1", "2", "--budget", "0"]
    status, found = run(tmp_path, "scaling", *arguments)
    assert status == 0
    points = [(row.series, row.subject, row.shape[0], row.threads) for row in found.rows]
    assert points == [
        ("size", "co_attention", 1, None),
        ("batch", "dsnet_tiny", 1, None),
        ("size", "dsnet_tiny", 1, None),
        ("threads", "dsnet_tiny", 2, 1),
        ("threads", "dsnet_tiny", 2, 2),
    ]
    printed = capsys.readouterr().out
    assert "dsnet_tiny, float32, by threads" in printed
    assert "2×3×64×64, 2 threads" in printed


def test_record_can_go_to_stdout(quick, capsys):
    arguments = ["--op", "depthwise_conv3x3", "--stage", "4", "--batch", "1", "--size", "32"]
    assert command.main(["ops", *arguments, "--baselines", "nchw", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["command"].startswith("python -m benchmarks ops")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--op", "convolution"], "invalid choice: 'convolution'"),
        (["ops", "--stage", "5"], "invalid choice: 5"),
        (["models", "--peers", "tvm"], "invalid choice: 'tvm'"),
        (["models", "--work", "detection"], "invalid choice: 'detection'"),
        (["scaling", "--size", "16"], "of at least 32 pixels, got '16'"),
        (["scaling", "--threads", "0"], "expected an integer of at least 1, got '0'"),
        (["compare"], "the following arguments are required: GITREF"),
        (["compare", "HEAD", "--margin", "2"], "expected a number from 0 to below 1, got '2'"),
    ],
)
def test_wrong_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_unwritable_record_is_refused_before_measuring(tmp_path, capsys):
    for name in ("ops", "models", "scaling"):
        assert command.main([name, "--json", str(tmp_path / "no" / "record.json")]) == 2
        assert f"python -m benchmarks {name}: --json: no such folder" in capsys.readouterr().err
