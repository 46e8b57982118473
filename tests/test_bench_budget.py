"""``dsnet bench`` ends: its time is shared among the rows, also on a slow machine."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsnet.bench import contention, remarks, row, session, table, timing
from dsnet.bench.report import Report, Result, Row
from dsnet.bench.suite import Task

ROOT = Path(__file__).resolve().parents[1]


class SlowMachine:
    """A clock that only measured work moves."""

    def __init__(self):
        self.now = 0.0

    def clock(self):
        return self.now

    def call(self, seconds):
        def work():
            self.now += seconds

        return work


def found_row(title="op", **changes):
    ours = Result("auto", "ours", 1.0, (1.0, 1.0), rounds=6, error=0.5, ratio=2.0)
    shape = (8, 2, 4, 4)
    fields = {"kind": "op", "subject": title, "use": "u: x", "work": "forward", "stage": 1}
    known = Row(
        **fields, shape=shape, dtype="float32", flops=1, bytes=1, best=None, results=(ours,)
    )
    return replace(known, **changes)


@pytest.fixture
def machine(monkeypatch):
    """A slow machine, on which nothing but the tasks takes time."""
    monkeypatch.setattr(session, "measure_roofs", lambda *args, **kwargs: ())
    monkeypatch.setattr(session, "yardstick", lambda device: lambda: 1.0)
    return SlowMachine()


def take(machine, tasks, budget):
    return session.take("dsnet bench", tasks, budget=budget, clock=machine.clock)


@pytest.mark.parametrize("slower", [1, 4, 30])
def test_a_run_ends_near_its_budget_and_names_the_rows_left_out(machine, slower):
    def task(number, seconds):
        def run(until):
            # Preparing cannot be cut short, timing can.
            machine.now += 0.5 * seconds * slower
            machine.now = max(machine.now, min(until, machine.now + 0.5 * seconds * slower))
            return found_row(f"row {number}")

        return Task(f"row {number}", run, seconds)

    tasks = [task(i, 5.0 if i < 3 else 1.0) for i in range(40)]
    found = take(machine, tasks, budget=60)
    assert found.seconds <= 60 + 0.5 * 5 * slower
    titles = [each.subject for each in found.rows] + list(found.missing)
    assert sorted(titles) == sorted(each.title for each in tasks)
    assert bool(found.missing) is (slower > 1)
    printed = table.render(found)
    assert all(title in " ".join(printed.split()) for title in found.missing)


def test_a_row_that_cannot_be_cut_short_is_not_started_near_the_end(machine):
    def task(number, seconds, least):
        def run(until):
            machine.now += seconds
            return found_row(f"row {number}")

        return Task(f"row {number}", run, seconds, least)

    found = take(machine, [task(0, 50, 0.0), task(1, 8, 30.0), task(2, 8, 0.0)], budget=60)
    assert [each.subject for each in found.rows] == ["row 0", "row 2"]
    assert found.missing == ("row 1",)


def test_a_row_without_memory_leaves_the_others(machine):
    def fails(until):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    tasks = [Task("large", fails), Task("small", lambda until: found_row("small"))]
    found = take(machine, tasks, budget=60)
    assert [each.subject for each in found.rows] == ["small"]
    assert found.failed == ("large: CUDA out of memory.",)
    assert "could not be timed: large: CUDA out of memory." in table.render(found)
    assert session.deliver(found, None) == 1


def test_time_that_a_row_leaves_goes_to_the_later_ones(machine):
    limits = []

    def run(until):
        limits.append(until - machine.now)
        machine.now += 1.0
        return found_row()

    take(machine, [Task(str(i), run, 1.0) for i in range(4)], budget=40)
    assert limits == pytest.approx([10, 13, 19, 37])


def test_timing_ends_after_the_round_under_way():
    machine = SlowMachine()
    calls = {"a": machine.call(3.0), "b": machine.call(3.0)}
    found = timing.measure(calls, budget=100, rounds=(6, 50), until=20, clock=machine.clock)
    # 6 s for finding the repeats, then rounds of 6 s that start before 20 s.
    assert {len(each.seconds) for each in found.values()} == {3}
    machine.now = 100
    found = timing.measure(calls, budget=100, rounds=(6, 50), until=20, clock=machine.clock)
    assert machine.now == 106
    assert {len(each.seconds) for each in found.values()} == {1}


def test_a_row_out_of_time_has_the_first_baseline_and_ours_and_names_the_others():
    values = {}

    def contender(name, role, compiles=False):
        return row.Contender(name, role, lambda: None, lambda: values, compiles=compiles)

    names = ["eager_nchw", "eager_channels_last", "sdpa"]
    contenders = [contender(name, "baseline") for name in names]
    contenders += [contender("compile", "baseline", True), contender("auto", "ours")]
    facts = {
        key: value
        for key, value in vars(found_row()).items()
        if key not in ("best", "results", "shortened")
    }

    def judge(values, slack):
        return row.Check(True, 0.5)

    late = row.run_row(contenders, judge, budget=1, until=time.perf_counter() - 1, **facts)
    timed = {result.name for result in late.results if result.median is not None}
    assert timed == {"eager_channels_last", "auto"}
    assert late.shortened
    assert not late.failed()
    assert late.result("sdpa").problem == row.OUT_OF_TIME
    whole = Report(
        {"cpu": "", "cpu_capability": "", "cores": 2, "threads": 2}, {}, None, "", "", 1, (late,)
    )
    printed = table.render(whole)
    assert "fwd!" in printed
    assert table.SHORTENED_LEGEND in printed
    assert "no time" in printed
    assert Report.from_json(whole.to_json()) == whole
    intime = row.run_row(contenders, judge, budget=0, **facts)
    assert all(result.problem is None for result in intime.results)
    assert not intime.shortened


def test_contention_is_told_in_one_line_above_the_tables():
    machine = {"cpu": "", "cpu_capability": "", "cores": 2, "threads": 2}
    alone = Report(machine, {}, None, "", "", 1, (found_row(),), cpu_share=0.99)
    assert "other programs" not in table.render(alone)
    shared = replace(alone, cpu_share=0.4)
    assert remarks.contention(0.4) in table.render(shared).split("\n\n")[0].splitlines()
    assert "had 40% of its threads' time" in remarks.contention(0.4)


def test_the_probe_tells_how_much_of_its_threads_time_it_had():
    probe = session.Probe(lambda: time.sleep(0.05) or 1.0)
    probe()
    assert probe.cpu_shares[0] < 0.5


@pytest.fixture
def execve(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.delenv(contention.POLICY, raising=False)
    monkeypatch.setattr(sys, "argv", ["dsnet", "bench", "--batch", "1"])
    started_with = ["python", "-X", "dev", "/bin/dsnet", "bench", "--batch", "1"]
    monkeypatch.setattr(sys, "orig_argv", started_with)
    return started


def test_shared_cores_make_threads_wait_passively(execve, monkeypatch):
    monkeypatch.setattr(contention, "busy_cores", lambda: 1.0)
    contention.wait_passively_on_shared_cores(["bench", "--batch", "1"])
    ((_, command, environment),) = execve
    assert command == [sys.executable, "-X", "dev", "/bin/dsnet", "bench", "--batch", "1"]
    assert environment[contention.POLICY] == "PASSIVE"


@pytest.mark.parametrize("case", ["idle", "set", "called"])
def test_otherwise_the_process_goes_on(case, execve, monkeypatch):
    monkeypatch.setattr(contention, "busy_cores", lambda: 0.0 if case == "idle" else 1.0)
    if case == "set":
        monkeypatch.setenv(contention.POLICY, "ACTIVE")
    arguments = ["bench"] if case == "called" else ["bench", "--batch", "1"]
    contention.wait_passively_on_shared_cores(arguments)
    assert execve == []


def test_cores_of_other_programs_are_counted_without_our_own(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 0 5\n")
    monkeypatch.setattr(contention, "STAT", stat)
    tick = os.sysconf("SC_CLK_TCK")

    def sleep(seconds):
        stat.write_text(f"cpu {100 + tick} {tick} 0 5\n")

    monkeypatch.setattr(contention.time, "sleep", sleep)
    monkeypatch.setattr(contention.time, "perf_counter", iter((0.0, 1.0)).__next__)
    monkeypatch.setattr(contention.time, "process_time", iter((0.0, 0.5)).__next__)
    assert contention.busy_cores() == pytest.approx(1.5)


def test_a_system_that_does_not_count_has_no_busy_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "STAT", tmp_path / "absent")
    assert contention.busy_cores() == 0.0


def test_a_process_with_a_small_budget_prints_a_line_per_row_and_the_rows_left_out():
    arguments = ["--mode", "ops", "--batch", "1", "--size", "32", "--budget", "1", "--json", "-"]
    arguments += ["--baselines", "channels_last"]
    done = subprocess.run(
        [sys.executable, "-m", "dsnet", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lines = done.stderr.splitlines()
    assert len(lines) == len(found["rows"]) >= 1
    assert lines[0].startswith("[1/56] depthwise_conv3x3 local, stage 1, forward: ")
    assert all(" ms" in line and line.endswith(" s") for line in lines)
    assert len(found["rows"]) + len(found["missing"]) == 56
