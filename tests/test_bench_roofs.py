"""The roofs of a report: measured with the timer of every row, and what they say of a row."""

import dataclasses

import pytest
import torch

from dsnet.bench import roofs, session, table
from dsnet.bench.report import Report, Result, Roof, Row
from dsnet.bench.suite import Task
from dsnet.bench.timing import Timing


def row(**changes):
    """32 bytes copied in 2 s, 64 bytes and 90 FLOPs in 10 s by ours."""
    fields = {
        "kind": "op",
        "subject": "op",
        "use": "use: f(x)",
        "work": "forward",
        "stage": 1,
        "shape": (1, 1, 2, 2),
        "dtype": "float32",
        "flops": 90,
        "bytes": 64,
        "best": None,
        "results": (
            Result("auto", "ours", median=10.0, quartiles=(9.0, 11.0), error=0.5),
            Result("copy", "roof", median=2.0, quartiles=(2.0, 2.0)),
        ),
    }
    return Row(**fields | changes)


def report(*rows, product=30.0):
    """A report whose matrix products run at ``product`` FLOPs per second."""
    return Report(
        machine={"cpu": "CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2},
        versions={"torch": "2.10"},
        commit=None,
        date="2000-01-01T00:00:00+00:00",
        command="dsnet bench",
        seconds=1.0,
        rows=rows,
        roofs=(Roof("product", "float32", int(product), 1.0, (1.0, 1.0)),),
    )


@pytest.mark.parametrize(
    ("product", "seconds", "by", "shown"),
    [(30.0, 4.0, "memory", "40% m"), (10.0, 9.0, "arithmetic", "90% a")],
)
def test_longer_of_both_bounds_a_row(product, seconds, by, shown):
    whole = report(row(), product=product)
    assert roofs.bound(whole.rows[0], whole) == roofs.Bound(seconds, by)
    text = table.render(whole)
    assert shown in text
    assert "of roof" in text


def test_no_bound_without_a_product_in_the_rows_dtype():
    whole = report(row(dtype="bfloat16"))
    assert roofs.bound(whole.rows[0], whole) is None
    assert "% m" not in table.render(whole)


def test_report_without_roofs_compares_with_a_copy():
    text = table.render(dataclasses.replace(report(row()), roofs=()))
    assert "of copy" in text
    assert "40%" in text


def test_roofs_are_those_of_every_dtype_named(monkeypatch):
    monkeypatch.setattr(roofs, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(roofs, "MATRIX", 8)
    called = []

    def timer(calls, budget):
        for call in calls.values():
            called.append(tuple(call().shape))
        return {key: Timing((0.5,), 1) for key in calls}

    found = roofs.measure_roofs([torch.float32, torch.bfloat16, torch.float32], timer)
    assert [(roof.name, roof.dtype) for roof in found] == [
        ("copy", "float32"),
        ("copy in cache", "float32"),
        ("product", "float32"),
        ("product", "bfloat16"),
    ]
    assert called == [(1 << 10,), (1 << 16,), (8, 8), (8, 8)]
    assert [roof.rate for roof in found] == [2**14, 2**20, 2048.0, 2048.0]


def test_heading_shows_the_roofs():
    heading = table.facts(report(row(), product=30e9))
    assert heading[-1] == "roofs: product float32 30.0 GFLOP/s"


def test_report_with_roofs_survives_json():
    whole = report(row(image=(32, 48), threads=2, series="threads"))
    assert Report.from_json(whole.to_json()) == whole


def test_first_versions_have_no_roofs_and_no_yardstick():
    whole = dataclasses.replace(report(row()), roofs=())
    text = whole.to_json().replace('"version": 4', '"version": 1')
    text = text.replace(' "roofs": [],\n', "").replace(' "yardstick": [],\n', "")
    assert '"roofs"' not in text
    assert '"yardstick"' not in text
    assert Report.from_json(text) == whole


def test_spreads_hold_the_drift_of_the_machine():
    # Of eleven numbers the second and the last but one are the deciles.
    evenly = (0.4, *(0.9 + i / 40 for i in range(9)), 3.0)
    whole = dataclasses.replace(report(row()), yardstick=evenly)
    assert whole.drift == pytest.approx(0.1)
    assert dataclasses.replace(whole, yardstick=evenly[:1]).drift == 0
    assert Report.from_json(whole.to_json()) == whole
    # Quartiles of 9 and 11 about 10 are another tenth.
    assert f"{10e3:.0f} ±20%" in table.render(whole)
    assert table.facts(whole)[-1].startswith("drift: ±10%")
    assert f"{10e3:.0f} ±10%" in table.render(report(row()))


def test_yardstick_is_timed_before_every_row_and_behind_the_last(monkeypatch, quick):
    seconds = iter((1.0, 2.0, 4.0))
    monkeypatch.setattr(session, "yardstick", lambda device: lambda: next(seconds))
    tasks = [Task(title, lambda until: row()) for title in ("first", "second")]
    found = session.take("command", tasks)
    assert found.yardstick == (1.0, 2.0, 4.0)
    assert len(found.rows) == 2


def test_yardstick_times_a_product():
    assert 0 < roofs.yardstick()() < 60


def test_ratio_has_its_interval():
    ours = Result("auto", "ours", 1.0, (1.0, 1.0), error=0.5, ratio=2.0, ratio_interval=(1.9, 2.1))
    assert " 2.00× ±5%" in table.render(report(row(results=(ours,))))
    unknown = dataclasses.replace(ours, ratio_interval=None)
    assert " ~2.00× " in table.render(report(row(results=(unknown,))))
