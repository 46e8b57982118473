"""``dsnet bench``: the checks, the schema, the command."""

import argparse
import dataclasses
import json
import math

import pytest
import torch

import dsnet_kernels
from dsnet import cli
from dsnet.bench import cases, ops, report, row, session, table
from dsnet.bench.check import check_directions, check_errors
from dsnet.bench.suite import Settings, tasks
from dsnet.commands import bench, image_size
from dsnet_kernels import reference


def perturbed(values, size):
    return {k: v + size * (-1.0) ** torch.arange(v.numel()).view_as(v) for k, v in values.items()}


@pytest.fixture
def oracle():
    generator = torch.Generator().manual_seed(0)
    return {"out": torch.randn(64, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (1.99, True), (2.1, False)])
def test_error_may_be_twice_the_references(oracle, factor, passes):
    references = [perturbed(oracle, 1e-3), perturbed(oracle, 1e-4)]
    check = check_errors(perturbed(oracle, factor * 1e-3), references, oracle)
    assert check.passed is passes
    assert check.worst == pytest.approx(factor / 2, rel=1e-6)


@pytest.mark.parametrize(("factor", "passes"), [(2.49, True), (2.6, False)])
def test_one_error_may_be_a_quarter_more(oracle, factor, passes):
    got = {"out": oracle["out"].clone()}
    got["out"][5] += factor * 1e-3
    check = check_errors(got, [perturbed(oracle, 1e-3)], oracle)
    assert check.passed is passes
    assert check.worst == pytest.approx(factor / 2.5, rel=1e-6)


def test_the_references_errors_are_those_of_every_draw():
    case, stage = cases.CASES[0], cases.stages("dsnet_tiny", 1, (64, 64))[3]
    draws = [ops.make_inputs(case, stage, torch.float32, True, seed) for seed in range(2)]
    references, oracle = ops.reference_values(case, draws)
    alone = [ops.reference_values(case, [draw]) for draw in draws]
    assert len(references) == 4
    assert not torch.equal(alone[0][1]["out 0"], alone[1][1]["out 0"])
    for name, truth in oracle.items():
        assert torch.equal(truth, alone[0][1][name])
        for found, (each, exact) in zip(references[::2], alone, strict=True):
            error = each[0][name].double() - exact[name]
            torch.testing.assert_close(found[name].double() - truth, error, rtol=0, atol=1e-14)


def test_two_roundings_are_allowed_where_the_reference_is_exact(oracle):
    eps = torch.finfo(torch.float64).eps
    rms = oracle["out"].square().mean().sqrt().item()
    assert check_errors(perturbed(oracle, 1.5 * eps * rms), [oracle], oracle).passed
    assert not check_errors(perturbed(oracle, 8 * eps * rms), [oracle], oracle).passed


@pytest.mark.parametrize("check", [check_errors, check_directions])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda x: x * 0, id="zeros"),
        pytest.param(lambda x: x.clone().index_fill_(0, torch.tensor([3]), math.nan), id="nan"),
        pytest.param(lambda x: x.roll(1), id="shifted"),
        pytest.param(lambda x: x[:-1], id="shape"),
        pytest.param(lambda x: None, id="missing"),
    ],
)
def test_wrong_values_are_refused(oracle, check, wrong):
    verdict = check({"out": wrong(oracle["out"])}, [perturbed(oracle, 1e-6)], oracle)
    assert not verdict.passed
    assert verdict.failures[0].startswith("out: ")


def test_zero_gradient_within_the_error_budget_is_refused_by_its_direction():
    truth = {"grad": torch.ones(4, dtype=torch.float64)}
    zeros = {"grad": torch.zeros(4, dtype=torch.float64)}
    inaccurate = [{"grad": 1.6 * truth["grad"]}]
    assert check_errors(zeros, inaccurate, truth).passed
    assert not check_directions(zeros, inaccurate, truth).passed


TRUTH = {"out": torch.linspace(1, 2, 8, dtype=torch.float64)}


def contender(name, role, values, **kwargs):
    return row.Contender(name, role, lambda: sum(range(100)), lambda: values, **kwargs)


def judged_row(*contenders):
    return row.run_row(
        list(contenders),
        lambda values, slack: check_errors(values, [perturbed(TRUTH, 1e-6)], TRUTH, slack),
        budget=0,
        kind="op",
        subject="op",
        use="use: f(x)",
        work="forward",
        stage=1,
        shape=(1, 2, 2, 2),
        dtype="float32",
        flops=8,
        bytes=64,
    )


def test_failed_check_yields_no_time_and_no_ratio():
    zeros = {"out": torch.zeros(8, dtype=torch.float64)}
    result = judged_row(
        contender("eager_nchw", "baseline", TRUTH), contender("auto", "ours", zeros)
    )
    (ours,) = result.ours()
    assert result.failed()
    assert ours.problem.startswith("check failed: out: maximum error")
    assert (ours.median, ours.ratio) == (None, None)
    text = "\n".join(table.render(sample_report(result)).splitlines())
    assert "FAILED" in text
    assert "check failed: out" in text


def test_contender_that_raises_is_told_and_the_others_are_measured():
    def broken():
        raise RuntimeError("no compiler\ndetails")

    raising = dataclasses.replace(contender("compile", "baseline", TRUTH), values=broken)
    result = judged_row(
        raising, contender("eager_nchw", "baseline", TRUTH), contender("auto", "ours", TRUTH)
    )
    assert result.result("compile").problem == "RuntimeError: no compiler"
    assert result.best == "eager_nchw"
    assert result.ours()[0].ratio > 0
    assert not result.failed()


def test_less_accurate_baseline_still_counts_where_ours_would_fail():
    coarse = perturbed(TRUTH, 1e-5)
    as_baseline = judged_row(
        contender("compile", "baseline", coarse), contender("auto", "ours", TRUTH)
    )
    assert as_baseline.best == "compile"
    assert judged_row(contender("auto", "ours", coarse)).failed()


def test_wrong_baseline_is_not_compared_with():
    wrong = contender("eager_nchw", "baseline", perturbed(TRUTH, 0.1))
    result = judged_row(wrong, contender("auto", "ours", TRUTH))
    assert result.best is None
    assert result.ours()[0].ratio is None


def sample_report(*rows):
    return report.Report(
        machine={"cpu": "CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2},
        versions={"torch": "2.10"},
        commit=None,
        date="2000-01-01T00:00:00+00:00",
        command="dsnet bench",
        seconds=1.5,
        rows=rows,
    )


def test_report_survives_json():
    whole = sample_report(
        judged_row(
            contender("eager_nchw", "baseline", TRUTH),
            contender("auto", "ours", TRUTH, chosen={"op": "cpu"}),
        )
    )
    assert report.Report.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("text", ['{"schema": "other", "version": 1}', '{"version": 99}', "[]"])
def test_foreign_report_is_refused(text):
    with pytest.raises(ValueError, match="report: expected dsnet-bench version 1, 2, 3 or 4"):
        report.Report.from_json(text)


def test_environment_fills_a_report():
    facts = report.environment("dsnet bench --batch 1")
    whole = report.Report(**facts, seconds=0.0, rows=())
    assert whole.command == "dsnet bench --batch 1"
    assert whole.machine["cpu"]
    assert whole.machine["threads"] >= 1
    assert whole.versions["torch"] == torch.__version__


def test_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    report.write_atomically(target, "old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        report.write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def parse(*arguments):
    parser = argparse.ArgumentParser(prog=bench.NAME)
    bench.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.argv = [bench.NAME, *arguments]
    return args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50"], "invalid choice: 'resnet50'"),
        (["--batch", "0"], "expected an integer of at least 1, got '0'"),
        (["--threads", "two"], "expected an integer of at least 1, got 'two'"),
        (["--size", "31"], "of at least 32 pixels, got '31'"),
        (["--size", "800x"], "of at least 32 pixels, got '800x'"),
        (["--size", "64x64x3"], "of at least 32 pixels, got '64x64x3'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backends", "mps"], "invalid choice: 'mps'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--budget", "0"], "expected a positive number of seconds, got '0'"),
        (["--baselines", "onnx"], "invalid choice: 'onnx'"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_wrong_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("800x1333", (800, 1333)), ("32×64", (32, 64))]
)
def test_image_sizes(text, size):
    assert image_size(text) == size


@pytest.mark.parametrize(
    ("path", "message"), [("no/file", "no such folder"), (".", "got the fold")]
)
def test_unwritable_result_is_refused_before_measuring(path, message, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "take", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(ValueError, match=f"--json: .*{message}"):
        bench.run(parse("--json", str(tmp_path / path)))


def test_empty_name_of_the_result_is_refused(monkeypatch):
    monkeypatch.setattr(session, "take", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(ValueError, match="--json: expected a file or -, got ''"):
        bench.run(parse("--json", ""))


def test_absent_backend_is_refused_with_its_reason(monkeypatch):
    states = {"operations": {"op": {"cpu": "not built"}}}
    monkeypatch.setattr(dsnet_kernels, "available_backends", lambda: ("reference",))
    monkeypatch.setattr(dsnet_kernels, "info", lambda: states)
    with pytest.raises(ValueError, match="--backends: cpu cannot run here: not built"):
        bench.run(parse("--backends", "cpu"))


def test_default_run_has_the_network_then_every_case_stage_and_pass():
    titles = [task.title for task in tasks(Settings())]
    assert len(titles) == len(set(titles)) == 8 * len(cases.CASES) + 3
    assert titles[:4] == [
        "dsnet_tiny inference, batch 1",
        "dsnet_tiny inference, batch 8",
        "dsnet_tiny training step, batch 8",
        "depthwise_conv3x3 local, stage 1, forward",
    ]


def test_detection_has_the_first_stage_of_every_case_on_one_large_image():
    found = tasks(Settings(mode="detection"))
    assert len(found) == 2 * len(cases.CASES)
    stages = [task.run.args[1] for task in found]
    assert {(s.number, s.batch, s.grid, s.global_grid) for s in stages} == {
        (1, 1, (200, 333), (25, 41))
    }


SMALL = ["--threads", "1", "--baselines", "nchw", "channels_last", "--size", "64"]


ROWS = {
    "ops": 8 * len(cases.CASES),
    "inference": 1,
    "training": 1,
    "detection": 2 * len(cases.CASES),
}


@pytest.mark.parametrize("mode", ROWS)
def test_run_prints_a_table_and_writes_the_same_report(mode, quick, tmp_path, capsys):
    target = tmp_path / "result.json"
    threads = torch.get_num_threads()
    status = bench.run(parse(*SMALL, "--mode", mode, "--batch", "2", "--json", str(target)))
    assert status == 0
    assert torch.get_num_threads() == threads
    whole = report.Report.from_json(target.read_text())
    assert whole.machine["threads"] == 1
    assert len(whole.rows) == ROWS[mode]
    for each in whole.rows:
        assert {result.name for result in each.results} >= {"eager_channels_last", "auto"}
        assert each.ours()[0].ratio > 0
        assert each.ours()[0].error <= 1
    captured = capsys.readouterr()
    assert captured.out == table.render(whole)
    assert len(captured.err.splitlines()) == ROWS[mode]
    assert max(map(len, captured.out.splitlines())) <= 120


def test_json_to_stdout_replaces_the_table(quick, capsys):
    arguments = [bench.NAME, *SMALL, "--mode", "inference", "--batch", "1", "--json", "-"]
    assert cli.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == report.SCHEMA
    assert document["command"] == " ".join(["dsnet", *arguments])


def zero_output(x, *args, **kwargs):
    return reference.depthwise_conv3x3(x, *args, **kwargs) * 0


def zero_gradient(x, *args, **kwargs):
    out = reference.depthwise_conv3x3(x, *args, **kwargs)
    return out.detach() + out * 0


def missing_tap(x, weight, *args, **kwargs):
    kept = torch.ones(3, 3, dtype=weight.dtype)
    kept[0, 2] = 0
    return reference.depthwise_conv3x3(x, weight * kept, *args, **kwargs)


@pytest.mark.parametrize("wrong", [zero_output, zero_gradient, missing_tap])
def test_wrong_kernel_fails_its_row(wrong, monkeypatch):
    def kernel(*args, backend, **kwargs):
        return wrong(*args, **kwargs)

    monkeypatch.setattr(dsnet_kernels, "depthwise_conv3x3", kernel)
    result = ops.op_row(
        cases.CASES[0],
        cases.stages("dsnet_tiny", batch=2, size=(32, 48))[0],
        dtype=torch.float32,
        backward=True,
        backends=["auto"],
        baselines=["eager_channels_last"],
        budget=0.0,
    )
    assert result.failed()
    assert "check failed" in result.ours()[0].problem
    assert result.ours()[0].ratio is None


def test_wrong_kernel_in_the_network_fails_the_run(quick, monkeypatch, capsys):
    def kernel(*args, backend, **kwargs):
        function = reference.depthwise_conv3x3 if backend == "reference" else zero_gradient
        return function(*args, **kwargs)

    monkeypatch.setattr(dsnet_kernels, "depthwise_conv3x3", kernel)
    assert bench.run(parse(*SMALL, "--mode", "training", "--batch", "2")) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "check failed: grad stages.0" in printed
