"""README and CONTRIBUTING say what the code does, and the picture is what its script draws."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cases import CASES
from public_layout import public_state_dict

import dsnet
import dsnet_kernels
from dsnet import cli
from dsnet.bench.peers import PEERS
from dsnet.commands import bench
from dsnet.macs import count_macs
from dsnet.variants import PUBLIC_REDUCTION, VARIANTS
from dsnet_kernels.backends import BACKENDS, OPERATIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import __main__ as benchmarks
from benchmarks.reporting import documents

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "docs/performance.md")
DOCUMENTS = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
# Without the results, which are filled in from records.
README = DOCUMENTS["README.md"]
for name in documents.README:
    README = documents.replaced(README, name, "")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SVG = "{http://www.w3.org/2000/svg}"


def fenced(text: str, language: str) -> list[str]:
    """The code blocks in one language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def spans(text: str) -> list[str]:
    """Code within lines, such as `dsnet/block.py`."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def table(first: str) -> list[list[str]]:
    """The rows of the README's table whose first column has this heading, without backquotes."""
    body = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    return [
        [cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in body.splitlines()
    ]


def paths(document: str) -> set[Path]:
    """What a document names: in code, or from its own folder as a link or picture."""
    text = DOCUMENTS[document]
    words = {word for span in spans(text) for word in span.split()}
    named = {w for w in words if "/" in w or w.endswith((".py", ".md", ".txt", ".h"))}
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    folder = (ROOT / document).parent
    return {ROOT / each.replace("<op>", "depthwise_conv3x3") for each in named} | {
        folder / link for link in links if "://" not in link
    }


def commands(start: str) -> list[str]:
    """Every command line that a document shows and that starts so."""
    lines = [
        line
        for text in DOCUMENTS.values()
        for block in (*fenced(text, "sh"), *spans(text))
        for line in re.split(r"\n|&&", block)
    ]
    return sorted({line.strip() for line in lines if line.strip().startswith(start)})


@pytest.fixture(scope="module")
def figure():
    """docs/block_figure.py as a module."""
    spec = importlib.util.spec_from_file_location("block_figure", ROOT / "docs/block_figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_picture_is_what_its_script_draws(figure):
    assert figure.TARGET == ROOT / "docs/block.svg"
    assert figure.TARGET.read_text("utf-8") == figure.draw()


def test_picture_is_described_and_shows_every_operation(figure):
    root = ElementTree.fromstring(figure.draw())
    assert root.get("aria-labelledby") == "title description"
    assert root.find(f"{SVG}title").text == figure.TITLE
    assert root.find(f"{SVG}desc").text == figure.DESCRIPTION
    lines = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert {name: lines.count(name) for name in OPERATIONS} == {
        name: 2 if name == "depthwise_conv3x3" else 1 for name in OPERATIONS
    }


def test_picture_marks_the_native_kernels_that_there_are(figure):
    native = {name for name, each in OPERATIONS.items() if set(each.present) - {"sdpa"}}
    assert native == figure.NATIVE == set(OPERATIONS)


def test_picture_shows_the_shapes_of_the_first_stage(figure):
    model = dsnet.create_model("dsnet_tiny", device="meta").eval()
    stage = model.stages[0]
    x = stage.embed(torch.empty(1, 3, 224, 224, device="meta"))
    out, local, global_ = stage.blocks[0].forward_streams(x)
    assert x.shape == out.shape == (1, figure.CHANNELS, figure.GRID, figure.GRID)
    assert local.shape == (1, figure.HALF, figure.GRID, figure.GRID)
    assert global_.shape == (1, figure.HALF, figure.COARSE, figure.COARSE)
    assert stage.blocks[0].mlp.fc1.out_features == figure.MLP_RATIO * figure.CHANNELS


def test_operations_and_their_native_kernels():
    shown = {name: kernel for name, _, kernel in table("operation")}
    assert shown == {
        name: ", ".join(operation.present) or "none yet" for name, operation in OPERATIONS.items()
    }


@pytest.mark.parametrize("row", table("model"), ids=lambda row: row[0])
def test_models_with_parameters_and_arithmetic(row):
    name, blocks, parameters, giga_macs = row
    model = dsnet.create_model(name, device="meta").eval()
    assert blocks == ", ".join(map(str, model.variant.depths))
    assert parameters == f"{sum(p.numel() for p in model.parameters()):,}"
    assert giga_macs == f"{count_macs(model) / 1e9:.3f}"


def test_models_are_all_listed():
    assert [row[0] for row in table("model")] == list(VARIANTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    named = paths(document)
    assert len(named) > 4
    # A record that has not been taken is named with the command that takes it.
    allowed = {documents.RECORDS["scaling"].name}
    assert [path for path in named if not path.exists() and path.name not in allowed] == []


@pytest.mark.parametrize("line", commands("dsnet "))
def test_command_line_is_accepted(line):
    args = cli._parser().parse_args(shlex.split(line, comments=True)[1:])
    assert args.prog == " ".join(line.split()[:2])


def test_every_command_is_shown():
    shown = {line.split()[1] for line in commands("dsnet ")}
    assert shown == {command.NAME for command in cli.commands.load()}


@pytest.mark.parametrize("line", commands("python -m benchmarks "))
def test_command_line_of_the_benchmarks_is_accepted(line):
    arguments = shlex.split(line, comments=True)[3:]
    args = benchmarks._parser().parse_args(arguments)
    assert args.prog == f"python -m benchmarks {arguments[0]}"


def test_every_command_of_the_benchmarks_is_shown():
    shown = {line.split()[3] for line in commands("python -m benchmarks ")}
    assert shown == {command.NAME for command in benchmarks.COMMANDS}


def test_prose_quotes_no_measurement():
    text = DOCUMENTS["docs/performance.md"]
    for name in documents.DOCUMENTS["docs/performance.md"]:
        text = documents.replaced(text, name, "")
    assert re.findall(r"\d+(?:\.\d+)? ?(?:%|×|[mµ]?s\b|[GM]B|GFLOP|images)", text) == []


def test_public_names_exist():
    named = set(re.findall(r"\b(dsnet|dsnet_kernels)\.([a-zA-Z]\w*)", " ".join(spans(README))))
    assert ("dsnet_kernels", "BackendUnavailable") in named
    for package, name in named:
        public = importlib.import_module(package).__all__
        assert name in public or importlib.util.find_spec(f"{package}.{name}"), (package, name)


def test_examples_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": public_state_dict()}, "dsnet_tiny.pth")
    networks, optimized, checkpoints, exported, operations = fenced(README, "python")
    (shown,) = fenced(README, "text")
    names = {}
    with dsnet_kernels.backend("auto"), torch.random.fork_rng():
        exec(networks, names)
        assert names["logits"].shape == (2, 10)
        assert [tuple(m.shape[1:]) for m in names["maps"]] == [
            (128, 20, 32),
            (320, 10, 16),
            (512, 5, 8),
        ]
        expected = names["model"].state_dict()
        exec(optimized, names)
        assert names["logits"].dtype == torch.bfloat16
        assert all(torch.equal(expected[k], v) for k, v in names["model"].state_dict().items())
        exec(checkpoints, names)
        assert names["model"].global_reduction == PUBLIC_REDUCTION
        assert dsnet.load_checkpoint("dsnet_tiny", "dsnet_tiny.safetensors").num_classes == 1000
        exec(exported, names)
        assert names["logits"].shape == (3, 1000)
        exec(operations, names)
        assert names["y"].shape == names["x"].shape
        assert dsnet_kernels.current_backend() == ("auto",)
    printed = capsys.readouterr().out
    available = dsnet_kernels.available_backends("depthwise_conv3x3")
    if "cpu" in available:
        for line, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
            # A backend that is not in this installation is refused for that reason.
            subject = expected.partition(": ")[0]
            is_absent = subject.removeprefix("  not ") in set(BACKENDS) - set(available)
            assert line.partition(": ")[0] == subject
            assert is_absent or line == expected
    else:
        assert printed.startswith("depthwise_conv3x3: reference (requested: auto)\n  not cpu: ")


def test_environment_variables_are_those_that_are_read():
    sources = [ROOT / "setup.py", *(ROOT / "build_backend").rglob("*.py")]
    sources += (ROOT / "csrc").rglob("*.cpp")
    sources += [*(ROOT / "dsnet").rglob("*.py"), *(ROOT / "dsnet_kernels").rglob("*.py")]
    reading = re.compile(r'(?:environ\.get\(|environ\[|getenv\(|\bflag\()\s*["\'](\w+)["\']')
    read = {name for path in sources for name in reading.findall(path.read_text("utf-8"))}
    # CMake reads CXX.
    shown = {name for row in table("variable") for name in re.findall(r"\w+", row[0])}
    assert shown == read | {"CXX"}


def test_baselines_of_other_runtimes_are_named():
    named = set(next(s for s in spans(README) if s.startswith("--baselines onnx")).split()[1:])
    assert named == set(PEERS) < set(bench.BASELINES)


def test_set_up_is_two_commands():
    assert fenced(README, "sh")[0].splitlines() == [
        "pip install . && dsnet bench",
        "pip install '.[test]' && pytest",
    ]


def test_results_are_rendered_from_the_records():
    sources = documents.sources()
    for name in documents.DOCUMENTS:
        assert documents.updated(name, DOCUMENTS[name], sources) == DOCUMENTS[name], name


def test_budgets_other_than_twice_the_references_error():
    found = {(name, backend): float(factor) for name, backend, factor, _ in table("budget of")}
    assert found == {(case.name, name): case.slack[name] for case in CASES for name in case.slack}
