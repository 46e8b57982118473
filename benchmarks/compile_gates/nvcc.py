"""Compiles every CUDA kernel and compares what it takes with ``nvcc.json``.

``python -m benchmarks.compile_gates.nvcc`` exits with 1 where a kernel has a stack frame, spills,
takes more registers or shared memory than the table allows, or is not in it. ``--update`` rewrites
the table, with the compiler's version. Another compiler's register counts are reported and do not
fail; its spills do.

The CPU seconds of each unit and the number of its kernels are printed, and have bounds.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules of the build find each other by their short names.
sys.path.append(str(ROOT / "build_backend"))
import cuda_build  # noqa: E402
from cuda_toolkit import WITHOUT_GPU, Toolkit, ToolkitError, architectures, find_nvcc  # noqa: E402

TABLE = Path(__file__).with_suffix(".json")
CACHE = ROOT / ".cache" / "nvcc"

BUILT = tuple(architectures(list(WITHOUT_GPU)))
"""Architectures of an install on a machine without a GPU."""
NEWER = (100,)
ARCHITECTURES = (*BUILT, *NEWER)
SECONDS_BOUND = 45.0
"""CPU seconds of one unit in such an install."""
KERNELS_BOUND = 200
"""Kernels of all units."""


class GateError(Exception):
    """The kernels cannot be compiled or the compiler's report cannot be read."""


@dataclass(frozen=True)
class Resources:
    """What a thread and a block of one kernel take, in registers and bytes."""

    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True)
class UnitReport:
    """What ``ptxas -v`` prints of one unit, and its CPU seconds in an install without a GPU."""

    text: str
    seconds: float


Kernels = Mapping[str, Mapping[str, Resources]]
"""Resources by kernel and target, such as ``sm_90``."""


@dataclass(frozen=True)
class Verdict:
    """Reasons to fail, and differences that another compiler explains."""

    failures: tuple[str, ...]
    notes: tuple[str, ...]


def nvcc_version(nvcc: Path) -> str:
    """Such as ``13.0.88``.

    Raises:
        GateError: if the compiler does not say.
    """
    text = _run([str(nvcc), "--version"])
    match = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    if match is None:
        raise GateError(f"{nvcc} --version: expected a version such as V13.0.88, got {text!r}")
    return match[1]


def compile_kernels(nvcc: Path, sources: Sequence[Path] = ()) -> dict[str, UnitReport]:
    """The report of each unit, from the cache where sources, flags and compiler are the same.

    Raises:
        GateError: if a unit does not compile.
    """
    version = nvcc_version(nvcc)
    targets = [Toolkit(nvcc, version, numbers).flags for numbers in (BUILT, NEWER)]
    flags = (*cuda_build.FLAGS, "-Xptxas", "-v")
    digest = hashlib.sha256(json.dumps([version, flags, targets]).encode())
    for folder in (cuda_build.SOURCES / "cuda", cuda_build.SOURCES / "common"):
        for path in sorted(p for p in folder.iterdir() if p.suffix != ".cu" and p.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")

    def report(source: Path) -> UnitReport:
        own = digest.copy()
        own.update(source.read_bytes())
        cached = CACHE / f"{source.stem}-{own.hexdigest()[:16]}.json"
        if cached.exists():
            return UnitReport(**json.loads(cached.read_text("utf-8")))
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            output = ["-c", "-o", str(Path(scratch, "kernels.o")), str(source)]
            try:
                built, newer = (
                    cuda_build.run([str(nvcc), *flags, *target, *output], source.name)
                    for target in targets
                )
            except ToolkitError as error:
                raise GateError(str(error)) from None
            found = UnitReport(built.output + newer.output, built.seconds)
            written = Path(scratch, cached.name)
            written.write_text(json.dumps(dataclasses.asdict(found)), "utf-8")
            os.replace(written, cached)
        return found

    CACHE.mkdir(parents=True, exist_ok=True)
    units = list(sources) or cuda_build.kernel_units()
    reports = cuda_build.in_parallel(report, units, len(os.sched_getaffinity(0)))
    return {source.stem: found for source, found in zip(units, reports, strict=True)}


def bounds_broken(reports: Mapping[str, UnitReport]) -> list[str]:
    """Units that compile for too long, and too many kernels."""
    failures = [
        f"{name}: {report.seconds:.0f} CPU seconds, not {SECONDS_BOUND:.0f}"
        for name, report in reports.items()
        if report.seconds > SECONDS_BOUND
    ]
    count = sum(kernel_count(report) for report in reports.values())
    if count > KERNELS_BOUND:
        failures.append(f"{count} kernels, not {KERNELS_BOUND}")
    return failures


def kernel_count(report: UnitReport) -> int:
    """Kernels of one unit, each once for all its targets."""
    return len({found["kernel"] for found in ENTRY.finditer(report.text)})


ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'")
FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"\b(\d+) bytes smem")


def parse(report: str) -> dict[str, dict[str, Resources]]:
    """Resources by mangled kernel and target, from what ``ptxas -v`` prints.

    Raises:
        GateError: if there is no kernel, or one without all its figures.
    """
    found: dict[str, dict[str, Resources]] = {}
    parts = re.split(r"(?=ptxas info\s*: Compiling entry function)", report)
    for part in parts[1:]:
        entry, frame, used = (pattern.search(part) for pattern in (ENTRY, FRAME, USED))
        if not (entry and frame and used):
            raise GateError(f"ptxas: expected stack frame, spills and registers, got {part!r}")
        shared = SHARED.search(part)
        found.setdefault(entry["kernel"], {})[entry["target"]] = Resources(
            registers=int(used["registers"]),
            shared=int(shared[1]) if shared else 0,
            stack=int(frame["stack"]),
            spills=int(frame["stores"]) + int(frame["loads"]),
        )
    if not found:
        raise GateError(f"ptxas: expected a report of at least one kernel, got {report!r}")
    return found


def demangle(kernels: Kernels) -> dict[str, Mapping[str, Resources]]:
    """The same under readable names: template arguments, but no namespace and no parameters.

    Raises:
        GateError: if two kernels have one name.
    """
    names = _run(["c++filt", "--no-params", *kernels]).splitlines()
    short = [re.sub(r"^void |\bdsnet::cuda::", "", name) for name in names]
    if len(set(short)) != len(kernels):
        raise GateError(f"c++filt: expected {len(kernels)} different names, got {short}")
    return dict(zip(short, kernels.values(), strict=True))


def compare(found: Kernels, allowed: Kernels, same_compiler: bool) -> Verdict:
    """Whether every kernel takes at most what the table allows, and nothing in local memory."""
    failures, notes = [], []
    for kernel, target, got in _each(found):
        where = f"{kernel}, {target}"
        for what in ("stack", "spills"):
            if getattr(got, what):
                failures.append(f"{where}: expected no {what}, got {getattr(got, what)} bytes")
        limit = allowed.get(kernel, {}).get(target)
        if limit is None:
            failures.append(f"{where}: not in {TABLE.name}")
            continue
        if got.shared > limit.shared:
            failures.append(f"{where}: {got.shared} bytes of shared memory, not {limit.shared}")
        if got.registers > limit.registers:
            excess = f"{where}: {got.registers} registers, not {limit.registers}"
            (failures if same_compiler else notes).append(excess)
        elif got.registers < limit.registers:
            notes.append(f"{where}: {got.registers} registers, fewer than {limit.registers}")
    for kernel, target, _ in _each(allowed):
        if target not in found.get(kernel, {}):
            failures.append(f"{kernel}, {target}: in {TABLE.name}, but no such kernel is compiled")
    return Verdict(tuple(failures), tuple(notes))


def _each(kernels: Kernels) -> Iterator[tuple[str, str, Resources]]:
    for kernel, targets in kernels.items():
        for target, resources in targets.items():
            yield kernel, target, resources


def read_table(path: Path = TABLE) -> tuple[str, dict[str, dict[str, Resources]]]:
    """The compiler's version, and the resources of every kernel."""
    table = json.loads(path.read_text("utf-8"))
    kernels = {
        kernel: {target: Resources(**fields) for target, fields in targets.items()}
        for kernel, targets in table["kernels"].items()
    }
    return table["nvcc"], kernels


def write_table(version: str, kernels: Kernels, path: Path = TABLE) -> None:
    """A line per kernel and target, so that a change shows as such."""
    blocks = []
    for kernel in sorted(kernels):
        lines = ",\n".join(
            f"   {json.dumps(target)}: {json.dumps(dataclasses.asdict(resources))}"
            for target, resources in sorted(kernels[kernel].items(), key=_architecture)
        )
        blocks.append(f"  {json.dumps(kernel)}: {{\n{lines}\n  }}")
    body = ",\n".join(blocks)
    text = f'{{\n "nvcc": {json.dumps(version)},\n "kernels": {{\n{body}\n }}\n}}\n'
    path.write_text(text, "utf-8")


def _architecture(entry: tuple[str, Resources]) -> int:
    """90 of ``("sm_90", …)``; nvcc's threads report the targets in any order."""
    return int(entry[0].removeprefix("sm_"))


def _run(command: list[str]) -> str:
    """Standard output and error of a command that has to succeed."""
    try:
        done = subprocess.run(
            command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError as error:
        raise GateError(f"{command[0]}: expected it on PATH: {error}") from None
    if done.returncode != 0:
        raise GateError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_gates.nvcc")
    parser.add_argument("--update", action="store_true", help=f"rewrite {TABLE.name}")
    args = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc: expected in CUDACXX, CUDA_HOME or PATH, found none", file=sys.stderr)
        return 2
    try:
        version = nvcc_version(nvcc)
        reports = compile_kernels(nvcc)
        found = demangle(parse("".join(report.text for report in reports.values())))
    except GateError as error:
        print(error, file=sys.stderr)
        return 2
    if args.update:
        write_table(version, found)
    expected, allowed = read_table()
    verdict = compare(found, allowed, same_compiler=version == expected)
    print(f"nvcc {version}, {TABLE.name} of nvcc {expected}: {len(found)} kernels")
    for name, report in sorted(reports.items()):
        print(f"  {name:<30} {kernel_count(report):>3} kernels {report.seconds:6.1f} CPU s")
    total = sum(report.seconds for report in reports.values())
    print(
        f"  {'all':<30} {len(found):>3} kernels {total:6.1f} CPU s, bounds per unit"
        f" {SECONDS_BOUND:.0f} CPU s, in all {KERNELS_BOUND} kernels"
    )
    for note in verdict.notes:
        print(f"note: {note}")
    failures = [*verdict.failures, *bounds_broken(reports)]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
