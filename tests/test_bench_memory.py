"""Peak memory of ``dsnet bench``: in the process, in a row, in the table."""

import sys

import pytest
import torch

from dsnet.bench import memory
from dsnet.bench.memory import peak_memory
from dsnet.bench.report import Report, Result, Row
from dsnet.bench.table import MEMORY_LEGEND, render

MIB = 2**20

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told by Linux")


@on_linux
@pytest.mark.parametrize("mebibytes", [20, 200], ids=["of the heap", "mapped"])
def test_temporary_counts_every_time(mebibytes):
    size = mebibytes * MIB

    def call():
        torch.ones(size, dtype=torch.uint8)

    for _ in range(3):
        assert peak_memory(call) == pytest.approx(size, abs=4 * MIB)


@on_linux
def test_only_what_is_held_at_once_counts():
    def call():
        for _ in range(8):
            torch.ones(64 * MIB, dtype=torch.uint8)

    # The allocator may give memory back late, but not that late.
    assert peak_memory(call) < 4 * 64 * MIB


def test_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    assert peak_memory(lambda: pytest.fail("called")) is None


def shown(*peaks):
    """The table of one row with these peaks of its best baseline and of ours."""
    best, ours = (
        Result(name, role, median=1e-3, quartiles=(1e-3, 1e-3), error=0.5, peak_bytes=peak)
        for name, role, peak in zip(("sdpa", "auto"), ("baseline", "ours"), peaks, strict=True)
    )
    row = Row(
        kind="op",
        subject="op",
        use="use: f(x)",
        work="forward",
        stage=1,
        shape=(1, 2, 2, 2),
        dtype="float32",
        flops=8,
        bytes=64,
        best="sdpa",
        results=(best, ours),
    )
    facts = {"cpu": "CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2}
    return render(
        Report(
            machine=facts,
            versions={"torch": "2.10"},
            commit=None,
            date="2000-01-01T00:00:00+00:00",
            command="dsnet bench",
            seconds=1.0,
            rows=(row,),
        )
    )


def test_table_shows_the_best_baselines_peak_beside_ours():
    text = shown(1_234_000_000, 56_700_000)
    heading, line = (line.split() for line in text.splitlines() if line[:1] in ("s", "1"))
    at = heading.index("MB")
    assert heading[at : at + 3] == ["MB", "best", "ours"]
    assert {"1234", "56.7"} <= set(line)
    assert text.endswith(f"{MEMORY_LEGEND}\n")


def test_table_without_peaks_has_no_column_for_them():
    assert "MB" not in shown(None, None)
