"""``python -m benchmarks report``: tables, pictures, documents; what is committed is current."""

import csv
import dataclasses
import io
import itertools
import re
import shutil
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks.gpu.phases import Phase
from benchmarks.gpu.record import Record
from benchmarks.reporting import (
    documents,
    files,
    markdown,
    performance,
    plots,
    records,
    spreadsheets,
)
from benchmarks.reporting.performance import Sources
from dsnet.bench.report import Report, Result, Roof, Row

FACTS = {
    "machine": {"cpu": "CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2},
    "versions": {"torch": "2.10"},
    "commit": None,
    "date": "2000-01-01T00:00:00+00:00",
    "command": "dsnet bench",
    "seconds": 1.0,
}
ROOFS = (
    Roof("copy", "float32", 10, 1e-9, (1e-9, 1e-9)),
    Roof("copy in cache", "float32", 40, 1e-9, (1e-9, 1e-9)),
    Roof("product", "float32", 100, 1e-9, (1e-9, 1e-9)),
)


def results(best, ours, interval=True, peaks=(None, None)):
    """The best baseline and ours, in seconds, and the copy."""
    ratio = best / ours
    low_and_high = (0.9 * ratio, 1.1 * ratio) if interval else None
    return (
        Result("eager_nchw", "baseline", best, (best, best), peak_bytes=peaks[0], error=0.5),
        Result(
            "auto",
            "ours",
            ours,
            (0.9 * ours, 1.1 * ours),
            error=0.5,
            chosen={"op": "cpu"},
            ratio=ratio,
            ratio_interval=low_and_high,
            peak_bytes=peaks[1],
        ),
        Result("copy", "roof", 1e-3, (1e-3, 1e-3)),
    )


def op(subject="co_attention", stage=1, best=2e-3, ours=1e-3, **changes):
    fields = {
        "kind": "op",
        "subject": subject,
        "use": "use: f(x)",
        "work": "forward",
        "stage": stage,
        "shape": (8, 2, 4, 4),
        "dtype": "float32",
        "flops": 10**6,
        "bytes": 10**5,
        "best": "eager_nchw",
        "results": results(best, ours),
        "image": (224, 224),
    }
    return Row(**fields | changes)


def network(best=40e-3, ours=20e-3, batch=8, **changes):
    fields = {
        "kind": "model",
        "subject": "dsnet_tiny",
        "use": "image classification",
        "work": "inference",
        "stage": 0,
        "shape": (batch, 3, 224, 224),
        "dtype": "float32",
        "flops": None,
        "bytes": None,
        "best": "eager_nchw",
        "results": results(best, ours)[:2],
        "image": (224, 224),
    }
    return Row(**fields | changes)


def curves():
    """A point of each curve of a scaling record, and a second one along the size."""
    sized = {"series": "size", "results": results(2e-3, 1e-3, peaks=(4 << 20, 1 << 20))}
    larger = {"series": "size", "results": results(9e-3, 4e-3, peaks=(16 << 20, 2 << 20))}
    return (
        network(series="batch"),
        network(series="threads", threads=2),
        op(**sized),
        op(**larger | {"image": (448, 448)}),
        network(use="backbone", **sized | {"results": sized["results"][:2]}),
    )


def report(*rows, roofs=ROOFS):
    return Report(**FACTS, rows=rows, roofs=roofs)


def whole():
    work = ("forward", "forward+backward")
    rows = [op(stage=stage, work=each) for stage in (1, 2, 3, 4) for each in work]
    return report(*rows, op("pointwise_mlp"), network(), network(batch=1), *curves())


@pytest.fixture
def drawing():
    return pytest.importorskip("matplotlib", reason="matplotlib (extra plots) is not installed")


# What is committed


@pytest.mark.parametrize("path", records.paths(), ids=lambda path: path.stem)
def test_committed_tables_are_those_of_their_record(path):
    for name, content in files.tables(path).items():
        assert (records.FOLDER / name).read_bytes() == content, name


@pytest.mark.parametrize("path", records.paths(), ids=lambda path: path.stem)
def test_every_row_of_a_committed_record_has_passed_its_check(path):
    failed = [(row.subject, row.work, row.shape) for row in records.load(path).rows if row.failed()]
    assert failed == []


def test_committed_pictures_are_those_of_their_records():
    expected = {
        f"{path.stem}_{picture.name}.svg": files.digest(path)
        for path in records.paths()
        for picture in plots.listed(records.load(path))
    }
    found = {path.name: path.read_text("utf-8") for path in records.FOLDER.glob("*.svg")}
    assert set(found) == set(expected)
    for name, source in expected.items():
        assert source in found[name], f"{name} is not of {source}: python -m benchmarks report"


def test_committed_pictures_are_what_this_matplotlib_draws(drawing):
    for path in records.paths():
        for name, content in files.pictures(path).items():
            if not name.endswith(".svg"):
                continue
            committed = (records.FOLDER / name).read_bytes()
            # Another version places things otherwise.
            if f"matplotlib {drawing.__version__}<".encode() in committed:
                assert committed == content, f"{name}: python -m benchmarks report"


def test_no_other_tables_are_committed():
    expected = {name for path in records.paths() for name in files.tables(path)}
    found = {path.name for kind in ("md", "csv") for path in records.FOLDER.glob(f"*.{kind}")}
    assert found == expected


# Pictures


def test_every_kind_of_picture_is_drawn_and_the_same_each_time(drawing):
    pictures = plots.listed(whole())
    names = [picture.name for picture in pictures]
    assert names == [
        "speedup_float32_batch8_224x224",
        "dsnet_tiny",
        "roofline_float32",
        "scaling",
    ]
    for picture in pictures:
        first, again = picture.files("a record"), picture.files("a record")
        assert first["svg"] == again["svg"]
        assert first["png"].startswith(b"\x89PNG")
        text = first["svg"].decode("utf-8")
        assert "a record" in text
        assert not re.search(r"<dc:date>|[ \t]\n", text)
        ElementTree.fromstring(text)


def words(picture):
    """What stands in a picture."""
    root = ElementTree.fromstring(picture.files("a record")["svg"])
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_pictures_name_what_they_show(drawing):
    shown = {picture.name: words(picture) for picture in plots.listed(whole())}
    assert {"forward", "forward+backward", "stage 4", "times faster"} <= set(
        shown["speedup_float32_batch8_224x224"]
    )
    assert {"inference, 8×224×224, float32", "400", "ours"} <= set(shown["dsnet_tiny"])
    assert {"copy", "matrix product", "co_attention", "pointwise_mlp"} <= set(
        shown["roofline_float32"]
    )
    assert {
        "dsnet_tiny, by batch",
        "dsnet_tiny, by threads",
        "co_attention, first stage: peak memory",
        "dsnet_tiny backbone: time",
        "as N·M",
        "as N + M",
    } <= set(shown["scaling"])


def test_failed_contender_leaves_the_others_in_the_picture(drawing):
    failed = Result("auto", "ours", problem="check failed: out 0", chosen={})
    rows = [op(), op(stage=2, results=(results(2e-3, 1e-3)[0], failed)), network()]
    for picture in plots.listed(report(*rows)):
        assert picture.files("a record")["svg"]


def test_record_without_roofs_has_no_roofline():
    names = [picture.name for picture in plots.listed(report(op(), network(), roofs=()))]
    assert names == ["speedup_float32_batch8_224x224", "dsnet_tiny"]


# Tables


def test_networks_are_in_timms_columns():
    train = network(work="training", best=80e-3, ours=50e-3)
    (_, infer, _, trained) = csv.DictReader(
        io.StringIO(spreadsheets.models(report(network(), train)))
    )
    assert infer["model"] == "dsnet_tiny"
    assert float(infer["infer_samples_per_sec"]) == pytest.approx(400.0)
    assert float(infer["infer_step_time"]) == pytest.approx(20.0)
    assert (infer["infer_batch_size"], infer["infer_img_size"]) == ("8", "224")
    assert (infer["infer_gmacs"], infer["param_count"]) == ("1.85", "10.53")
    assert infer["train_step_time"] == ""
    assert float(trained["train_samples_per_sec"]) == pytest.approx(160.0)
    assert (trained["infer_step_time"], trained["contender"]) == ("", "auto")
    assert trained["threads"] == "2"


def test_operations_have_a_line_per_contender():
    lines = list(csv.DictReader(io.StringIO(spreadsheets.ops(report(op(), network())))))
    assert [line["contender"] for line in lines] == ["eager_nchw", "auto", "copy"]
    assert (lines[1]["shape"], lines[1]["backends"]) == ("8x2x4x4", "cpu")
    assert float(lines[1]["ratio"]) == 2.0
    assert spreadsheets.ops(report(network())) == ""
    assert spreadsheets.models(report(op())) == ""


def test_markdown_has_every_table_and_marks_nothing_up():
    text = markdown.render(whole())
    for title in ("co_attention, float32", "dsnet_tiny, float32", "dsnet_tiny, float32, by batch"):
        assert f"## {title}\n" in text
    assert "2.00 ±0%\\* |" in text
    assert "\n\n\n" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    for first, second in itertools.pairwise(rows):
        if second.startswith("|---"):
            assert first.count(" | ") + 1 == second.count("---")


# Documents


def sources(tmp_path, results, peers=None, scaling=None):
    paths = {name: tmp_path / f"{name}.json" for name in ("results", "peers", "scaling")}
    return Sources(results, peers or report(network()), scaling, paths)


def test_shares_add_up_to_the_network(tmp_path):
    # Two blocks of the first stage, one of the last.
    rows = [op(stage=1, best=3e-3, ours=1e-3), op("pointwise_mlp", stage=4, best=9e-3, ours=6e-3)]
    text = performance.shares(sources(tmp_path, report(*rows, network())))
    assert "| `co_attention` | 0.00 | 6.00 | 2.00 | 4.00 | 10% |" in text
    assert "| `pointwise_mlp` | 0.00 | 9.00 | 6.00 | 3.00 | 30% |" in text
    assert "| all else |  | 25.00 | 12.00 | 13.00 | 60% |" in text
    assert "| the network |  | 40.00 | 20.00 | 20.00 | 100% |" in text


def test_shares_without_the_network_say_so(tmp_path):
    text = performance.shares(sources(tmp_path, report(op())))
    assert text == "The record has no inference of 8 images by dsnet_tiny.\n"


def test_work_is_beside_its_roof(tmp_path):
    # 100 kB at the copy's 256 kB/s take 0.39 s, far more than its FLOPs.
    text = performance.work(sources(tmp_path, report(op(ours=0.5))))
    copy = 2 * 4 * 8 * 2 * 4 * 4 / 1e-3
    share = 10**5 / copy / 0.5
    assert f"| 1.0 | 0.10 | 10.0 | memory | {share:.0%} |" in text


def test_losses_are_the_rows_that_are_not_faster_beyond_doubt(tmp_path):
    slower = op(best=1e-3, ours=2e-3)
    doubtful = op(stage=2, results=results(2e-3, 1e-3, interval=False))
    faster = op(stage=3)
    text = performance.losses(sources(tmp_path, report(slower, doubtful, faster)))
    assert "stage 1" in text
    assert "stage 2" in text
    assert "stage 3" not in text
    assert performance.losses(sources(tmp_path, report(faster))) == "No row.\n"


def test_absent_scaling_record_is_named_with_its_command(tmp_path):
    text = performance.scaling(sources(tmp_path, report(op())))
    assert "`python -m benchmarks scaling --json benchmarks/results/scaling.json`" in text


def test_every_block_is_filled_from_whole_records(tmp_path):
    found = sources(tmp_path, whole(), whole(), report(*curves()))
    for name, block in performance.BLOCKS.items():
        text = block(found)
        assert text.endswith("\n"), name
        assert "None" not in text, name
    assert "![Scaling" in performance.scaling(found)


def test_block_that_is_not_there_once_is_refused():
    block = "<!-- a:begin -->\nold\n<!-- a:end -->\n"
    assert documents.replaced(block, "a", "new\n") == block.replace("old", "new")
    for text, count in ((block * 2, 2), ("", 0)):
        with pytest.raises(ValueError, match=f"expected one block a, got {count}"):
            documents.replaced(text, "a", "new")


# The command


def test_command_writes_every_file_beside_the_record_or_elsewhere(tmp_path, drawing, capsys):
    path = tmp_path / "record.json"
    path.write_text(report(op(), network()).to_json(), "utf-8")
    assert command.main(["report", str(path), "--no-plots"]) == 0
    tables = {"record.md", "record_models.csv", "record_ops.csv"}
    assert {each.name for each in tmp_path.iterdir()} == {"record.json", *tables}
    out = tmp_path / "out" / "deep"
    assert command.main(["report", str(path), "--out", str(out)]) == 0
    pictures = ("speedup_float32_batch8_224x224", "dsnet_tiny", "roofline_float32")
    expected = {f"record_{name}.{kind}" for name in pictures for kind in ("svg", "png")}
    assert {each.name for each in out.iterdir()} == tables | expected
    assert str(out / "record.md") in capsys.readouterr().out


def test_pictures_without_matplotlib_are_refused_with_the_extra(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    path.write_text(report(op()).to_json(), "utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["report", str(path)]) == 2
    assert "pip install 'dsnet-kernels[plots]'" in capsys.readouterr().err


def test_documents_are_filled_by_the_command(tmp_path, monkeypatch, capsys):
    results = tmp_path / "benchmarks/results"
    shutil.copytree(records.FOLDER, results)
    (tmp_path / "docs").mkdir()
    for name in documents.DOCUMENTS:
        text = (documents.ROOT / name).read_text("utf-8")
        for block in documents.DOCUMENTS[name]:
            text = documents.replaced(text, block, "")
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(records, "FOLDER", results)
    monkeypatch.setattr(records, "paths", lambda: [results / "cpu_two_cores.json"])
    (results / "of_a_record_that_is_gone.md").write_text("old")
    assert command.main(["report", "--no-plots"]) == 0
    printed = capsys.readouterr().out
    assert f"removed {results / 'of_a_record_that_is_gone.md'}\n" in printed
    assert {each.name for each in results.glob("*.md")} == {"cpu_two_cores.md"}
    assert list(results.glob("*.svg"))
    for name in documents.DOCUMENTS:
        expected = documents.updated(
            name, (tmp_path / name).read_text("utf-8"), documents.sources()
        )
        assert (tmp_path / name).read_text("utf-8") == expected
        assert str(tmp_path / name) in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "schema: expected dsnet-bench or dsnet-gpu, got None"),
        ('{"schema": "other"}', "got other"),
        ('{"schema": "dsnet-bench", "version": 99}', "expected dsnet-bench version 1, 2, 3 or 4"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_record_is_refused_with_its_name(text, message, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text, "utf-8")
    assert command.main(["report", str(path), "--no-plots"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "record.json" in error


# A GPU's records


def gpu_record(dry_run=False):
    rows = [dataclasses.asdict(op(work=work)) for work in ("forward", "forward, CUDA graph")]
    measured = {
        "roofs": {
            "roofs": [
                dataclasses.asdict(Roof(name, "bfloat16", work, 1.0, (1.0, 1.0)))
                for name, work in (("copy", 10), ("product", 16))
            ]
        },
        "ops": {"rows": rows},
    }
    return Record(
        dry_run=dry_run,
        machine={"cpu": "CPU"},
        gpu={"name": "GPU", "capability": "9.0", "multiprocessors": 132, "driver": "1"},
        versions={"torch": "2.10", "nvcc": None},
        commit=None,
        native_sources="0" * 64,
        date="2000-01-01",
        command="python -m benchmarks.gpu",
        seconds=1.0,
        phases=tuple(
            Phase(name, "passed", 1.0, 2.0, "log", results=found)
            for name, found in measured.items()
        ),
    )


def test_record_of_a_gpu_has_the_same_tables_and_pictures(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(gpu_record().to_json(), "utf-8")
    found = records.load(path)
    assert (found.machine["cpu"], found.roof("copy").rate, found.roof("product").rate) == (
        *("GPU", 10.0, 16.0),
    )
    assert [row.work for row in found.rows] == ["forward", "forward, CUDA graph"]
    tables = files.tables(path)
    assert set(tables) == {"gpu.md", "gpu_ops.csv"}
    assert tables["gpu.md"].startswith(b"# GPU, driver 1")
    assert [picture.name for picture in plots.listed(found)] == ["speedup_float32_batch8_224x224"]


def test_dry_run_of_a_gpu_is_no_record(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(gpu_record(dry_run=True).to_json(), "utf-8")
    with pytest.raises(ValueError, match="expected a run on a GPU, got a dry run"):
        records.load(path)
