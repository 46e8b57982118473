"""``python -m benchmarks compare``: verdicts on a clock of its own, and two commits end to end."""

import subprocess
import sys

import pytest
import torch
from test_bench_timing import Machine

from benchmarks import __main__ as command
from benchmarks.commands import compare
from benchmarks.comparing import jobs, rounds, sides, worker
from benchmarks.comparing.rounds import HERE, OTHER, confirmed, verdict
from benchmarks.comparing.sides import Side, SideError
from dsnet.bench import cases, timing
from dsnet.bench.report import Report, Result, Row
from dsnet_kernels.backends import OPERATIONS

SEEDS = range(200)


def row(ratio, low, high, **changes):
    """A row with this ratio of the other commit's time to ours."""
    interval = None if low is None else (low, high)
    other = Result(OTHER, "baseline", median=ratio, quartiles=(ratio, ratio))
    here = Result(HERE, "ours", 1.0, (1.0, 1.0), ratio=ratio, ratio_interval=interval)
    fields = {
        "kind": "op",
        "subject": "op",
        "use": "use: f(x)",
        "work": "forward",
        "stage": 1,
        "shape": (1, 2, 2, 2),
        "dtype": "float32",
        "flops": 1,
        "bytes": 1,
        "best": OTHER,
        "results": (other, here),
    }
    return Row(**fields | changes)


def measured(seed, cost, noise=0.1):
    """The row of two commits with these costs on a noisy machine, timed as the command does."""
    machine = Machine(seed, noise=noise)
    calls = {OTHER: machine.call("other", 1.0), HERE: machine.call("here", cost)}
    found = timing.measure(
        calls, budget=0, rounds=rounds.ROUNDS, min_sample=1e-9, clock=machine.clock
    )
    ratio = timing.compare(found[OTHER], found[HERE])
    return row(ratio.value, ratio.low, ratio.high)


def test_planted_slow_down_is_found():
    verdicts = [verdict(measured(seed, 1.3)) for seed in SEEDS]
    assert verdicts.count("slower") >= 0.98 * len(SEEDS)


def test_planted_speed_up_is_found():
    verdicts = [verdict(measured(seed, 1 / 1.3)) for seed in SEEDS]
    assert verdicts.count("faster") >= 0.98 * len(SEEDS)


def test_noise_alone_is_no_difference():
    verdicts = [verdict(measured(seed, 1.0)) for seed in SEEDS]
    assert verdicts.count("same") >= 0.99 * len(SEEDS)


def test_difference_within_the_margin_is_none():
    assert all(verdict(measured(seed, 1.03, noise=0.001)) == "same" for seed in SEEDS[:20])
    assert verdict(measured(0, 1.03, noise=0.001), margin=0.01) == "slower"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (row(0.8, 0.7, 0.9), "slower"),
        (row(0.8, 0.7, 0.96), "same"),
        (row(0.8, None, None), "same"),
        (row(1.2, 1.1, 1.3), "faster"),
        (row(1.2, 1.04, 1.3), "same"),
    ],
)
def test_whole_interval_must_lie_beyond_the_margin(found, expected):
    assert verdict(found, margin=0.05) == expected


def test_row_without_a_time_is_not_compared():
    other = Result(OTHER, "baseline", problem="check failed: out 0")
    here = Result(HERE, "ours", 1.0, (1.0, 1.0))
    assert verdict(row(1.0, 1.0, 1.0, results=(other, here))) == "not compared"


def test_what_seems_slower_is_measured_again_and_nothing_else():
    first = [row(1.0, 0.9, 1.1), row(0.7, 0.6, 0.8), row(0.7, 0.6, 0.8, stage=2)]
    asked = []

    def again(indices):
        asked.extend(indices)
        return [row(1.0, 0.9, 1.1), row(0.7, 0.6, 0.8, stage=2)]

    assert list(map(verdict, confirmed(first, again))) == ["same", "same", "slower"]
    assert asked == [1, 2]
    assert confirmed(first[:1], lambda _: pytest.fail("measured again")) == first[:1]


# What a worker runs, in this process


def answered(job, tmp_path):
    """A lenient check of what a worker computes for ``job``, and its answer to the request."""
    told, check = job.prepare()
    torch.save(told, tmp_path / "job")
    there = worker.Worker()
    answer = there.answer({"load": str(tmp_path / "job"), "values": str(tmp_path / "values")})
    with torch.inference_mode(told["inference"]):
        verdict = check(torch.load(tmp_path / "values"), 4.0)
    assert there.answer({"repeats": 2})["seconds"] > 0
    return verdict, answer


def test_worker_runs_every_operation(tmp_path):
    found = list(jobs.operations("dsnet_tiny", 1, (64, 64), torch.float32, numbers=[2]))
    assert {job.facts["subject"] for job in found} == {
        case.operation for case in cases.CASES if case.operation in OPERATIONS
    }
    for job in found:
        verdict, answer = answered(job, tmp_path)
        assert verdict.passed, (job.title, verdict.failures)
        assert list(answer["chosen"]) == [job.facts["subject"]]


@pytest.mark.parametrize("training", [False, True])
def test_worker_runs_a_network(training, tmp_path):
    job = jobs.network("dsnet_tiny", 2, (64, 64), torch.float32, training)
    verdict, answer = answered(job, tmp_path)
    assert verdict.passed, verdict.failures
    assert answer == {"chosen": {}}


def test_worker_tells_what_it_cannot_run(tmp_path):
    job = next(jobs.operations("dsnet_tiny", 1, (64, 64), torch.float32))
    told, _ = job.prepare()
    torch.save(told | {"operation": "of another time"}, tmp_path / "job")
    answer = worker.Worker().answer({"load": str(tmp_path / "job"), "values": "unused"})
    assert answer["error"].startswith("AttributeError: ")


# Two commits of a repository whose operation costs what its own clock says, not what it takes.

PACKAGE = """
import math
import random
import time

from torch.nn import functional as F

COST = {"local": LOCAL, "position": 0.01}
random_ = random.Random(SEED)
now = 0.0
time.perf_counter = lambda: now


def depthwise_conv3x3(x, weight, bias, *, residual, scale=None, shift=None):
    global now
    now += COST["position" if scale is None else "local"] * math.exp(random_.gauss(0, 0.05))
    print("a library that prints")
    y = x if scale is None else x * scale[:, None, None] + shift[:, None, None]
    return x + F.conv2d(y, weight, bias, padding=1, groups=x.shape[1])
"""

SETUP = "import pathlib, sys; pathlib.Path('built').write_text(' '.join(sys.argv[1:]))\n"


@pytest.fixture
def repository(tmp_path):
    """Commits a package whose ``local`` use takes the first time given, then one of the second."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    def commit(before, after):
        git("init", "--initial-branch=main")
        (root / "setup.py").write_text(SETUP)
        (root / "dsnet_kernels").mkdir()
        for seed, cost in enumerate((before, after)):
            source = PACKAGE.replace("LOCAL", repr(cost)).replace("SEED", str(seed))
            (root / "dsnet_kernels/__init__.py").write_text(source)
            git("add", ".")
            git("commit", "-m", "a cost")
        return root

    return commit


ARGUMENTS = ["--work", "ops", "--op", "depthwise_conv3x3", "--stage", "4", "--batch", "1"]
ARGUMENTS += ["--size", "64", "--budget", "0", "--threads", "1"]


def test_planted_slow_down_of_a_commit_is_found_and_noise_is_not(
    repository, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "ROOT", repository(0.01, 0.013))
    target = tmp_path / "result.json"
    status = command.main(["compare", "HEAD~1", *ARGUMENTS, "--json", str(target)])
    printed = capsys.readouterr().out
    result = Report.from_json(target.read_text("utf-8"))
    found = {(each.use.partition(":")[0], each.work): verdict(each) for each in result.rows}
    assert found == {
        ("local", "forward"): "slower",
        ("local", "forward+backward"): "slower",
        ("position", "forward"): "same",
        ("position", "forward+backward"): "same",
    }
    assert status == 1
    assert "margin 5%: 2 slower, 0 faster, 2 same, 0 not compared" in printed
    assert result.rows[0].ours()[0].ratio == pytest.approx(1 / 1.3, rel=0.1)
    assert all(each.ours()[0].rounds >= rounds.ROUNDS[0] for each in result.rows)
    root = compare.ROOT
    trees = subprocess.run(
        ["git", "worktree", "list"], cwd=root, check=True, capture_output=True, text=True
    )
    assert len(trees.stdout.splitlines()) == 1
    assert not (root / "built").exists()


def test_same_commit_has_no_difference(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", repository(0.01, 0.01))
    assert command.main(["compare", "HEAD~1", *ARGUMENTS]) == 0
    assert "0 slower, 0 faster, 4 same, 0 not compared" in capsys.readouterr().out


def test_wrong_results_here_fail_without_a_ratio(repository, monkeypatch, capsys):
    root = repository(0.01, 0.01)
    source = root / "dsnet_kernels/__init__.py"
    source.write_text(source.read_text("utf-8").replace("return x +", "return 1.01 * x +"))
    monkeypatch.setattr(compare, "ROOT", root)
    assert command.main(["compare", "HEAD", *ARGUMENTS]) == 1
    printed = capsys.readouterr().out
    assert "here, stage 4, forward: check failed: out 0" in printed
    assert "4 not compared" in printed


def test_checkout_that_is_built_must_be_of_the_commit(repository, monkeypatch, capsys):
    root = repository(0.01, 0.01)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "checkout", lambda *_: pytest.fail("built"))
    assert command.main(["compare", "HEAD", *ARGUMENTS, "--built", str(root)]) == 0
    assert "4 same" in capsys.readouterr().out
    assert command.main(["compare", "HEAD~1", *ARGUMENTS, "--built", str(root)]) == 2
    assert "--built: expected a checkout of " in capsys.readouterr().err


def test_unknown_commit_is_named(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", repository(0.01, 0.01))
    assert command.main(["compare", "no-such-branch", *ARGUMENTS]) == 2
    assert "git rev-parse: " in capsys.readouterr().err


def test_build_that_fails_is_told(repository, monkeypatch, capsys):
    root = repository(0.01, 0.01)
    monkeypatch.setattr(compare, "ROOT", root)
    failing = [sys.executable, "-c", "print('no compiler'); raise SystemExit(3)"]
    monkeypatch.setattr(sides, "BUILD", failing)
    assert command.main(["compare", "HEAD", *ARGUMENTS]) == 2
    assert "the build of the other commit failed: no compiler" in capsys.readouterr().err


def test_worker_refuses_the_package_of_another_place(tmp_path):
    with pytest.raises(SideError, match=r"the worker of .* ended with 1"):
        Side(tmp_path, 1)
