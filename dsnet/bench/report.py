"""The result schema: dataclasses, to JSON and back, written atomically."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device

SCHEMA = "dsnet-bench"
VERSION = 4
READABLE = (1, 2, 3, 4)
"""Versions. The first has no roofs, and no image, threads and series of a row. The first two have
no yardstick. The first three have no launches, judged images, shortened or missing rows."""

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Result:
    """One contender of a row.

    Args:
        name: ``eager_nchw``, ``eager_channels_last``, ``compile``, ``sdpa``, ``copy``, or the name
            of a peer or a backend.
        role: ``"baseline"``, ``"ours"`` or ``"roof"``.
        median: seconds per call; None where it was not timed.
        quartiles: first and third, of the rounds.
        rounds: samples taken.
        repeats: calls per sample.
        compile_seconds: what the first call took where it compiles, not part of the median.
        error: the worst error over what the check allows; None for the roof.
        problem: why there is no time, or why it does not count; None if all is well.
        chosen: the backend behind each operation.
        ratio: best baseline's time over this one's; None without a passed check.
        ratio_interval: its 95 % confidence interval.
        peak_bytes: by :func:`.memory.peak_memory`; None where it was not measured.
        launches: kernels that a call runs on a GPU; None where they were not counted.
    """

    name: str
    role: str
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    repeats: int = 0
    compile_seconds: float | None = None
    error: float | None = None
    problem: str | None = None
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    peak_bytes: int | None = None
    launches: int | None = None


@dataclass(frozen=True)
class Row:
    """One measurement: the same work done by every contender.

    Args:
        kind: ``"op"`` or ``"model"``.
        subject: an operation or a model.
        use: of the operation, or ``"image classification"``.
        work: ``forward``, ``forward+backward``, ``inference`` or ``training``.
        stage: of the network, 0 for a model.
        shape: of the activation or the images.
        dtype: of activations and parameters.
        flops, bytes: of one call by formula; None for a model.
        best: the name of the fastest baseline whose check passed.
        results: the contenders.
        notes: what a reader must know to judge the row.
        image: rows and columns of the image that the shape belongs to.
        threads: of this row; None for those of the machine in the report.
        series: ``batch``, ``size`` or ``threads``, whichever varies along the curve that the row is
            a point of; empty for a row by itself.
        judged: images that were checked; None for all of the batch.
        shortened: whether the row's time ran out, so that it has fewer rounds or contenders.
    """

    kind: str
    subject: str
    use: str
    work: str
    stage: int
    shape: tuple[int, ...]
    dtype: str
    flops: int | None
    bytes: int | None
    best: str | None
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()
    image: tuple[int, int] | None = None
    threads: int | None = None
    series: str = ""
    judged: int | None = None
    shortened: bool = False

    def result(self, name: str) -> Result | None:
        """The baseline or roof of that name."""
        for result in self.results:
            if result.name == name and result.role != "ours":
                return result
        return None

    def ours(self) -> list[Result]:
        return [result for result in self.results if result.role == "ours"]

    def failed(self) -> bool:
        """Whether one of ours failed its check or could not run."""
        return any(result.problem is not None for result in self.ours())

    def bandwidth(self, result: Result) -> float | None:
        """Bytes per second by formula."""
        if self.bytes is None or result.problem is not None or not result.median:
            return None
        return self.bytes / result.median

    def copy_bandwidth(self) -> float | None:
        """Bytes per second of a copy of the activation, which reads and writes it once."""
        roof = self.result("copy")
        if roof is None or not roof.median:
            return None
        return self.copy_bytes() / roof.median

    def copy_bytes(self) -> int:
        return 2 * ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Roof:
    """What the machine reaches at one kind of work, timed in the run that it is compared with.

    Args:
        name: ``copy`` in memory, ``copy in cache``, or ``product`` of matrices.
        dtype: of the elements.
        work: of a call: bytes read and written, or FLOPs.
        median: seconds per call.
        quartiles: first and third, of the rounds.
    """

    name: str
    dtype: str
    work: int
    median: float
    quartiles: tuple[float, float]

    @property
    def rate(self) -> float:
        """Bytes or FLOPs per second."""
        return self.work / self.median


@dataclass(frozen=True)
class Report:
    """A run of ``dsnet bench``, or of ``python -m benchmarks``.

    Args:
        machine, versions, commit, date, command: see :func:`environment`.
        seconds: that the run took.
        rows: what was measured, in order.
        roofs: what the machine reaches.
        yardstick: seconds of one and the same work before every row and behind the last; empty
            where it was not timed.
        cpu_share: CPU time that this work had over the wall-clock time of its threads: less than 1
            where other programs use the cores. None on a GPU, and where it was not measured.
        missing: titles of the rows for which there was no time.
        failed: titles of the rows for which there was no memory, with the error.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    command: str
    seconds: float
    rows: tuple[Row, ...]
    roofs: tuple[Roof, ...] = ()
    yardstick: tuple[float, ...] = ()
    cpu_share: float | None = None
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    schema: str = SCHEMA
    version: int = VERSION

    @property
    def drift(self) -> float:
        """Half of what lies between the yardstick's first and last decile, over its median."""
        if len(self.yardstick) < 2:
            return 0.0
        deciles = statistics.quantiles(self.yardstick, n=10, method="inclusive")
        return (deciles[-1] - deciles[0]) / 2 / statistics.median(self.yardstick)

    def roof(self, name: str, dtype: str | None = None) -> Roof | None:
        """The roof of that name, and of that dtype if one is given."""
        for roof in self.roofs:
            if roof.name == name and dtype in (None, roof.dtype):
                return roof
        return None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: for text that is no report of a version in :data:`READABLE`.
        """
        fields = json.loads(text)
        found = (fields.get("schema"), fields.get("version")) if isinstance(fields, dict) else None
        if found not in [(SCHEMA, version) for version in READABLE]:
            *earlier, last = map(str, READABLE)
            versions = f"{', '.join(earlier)} or {last}"
            raise ValueError(f"report: expected {SCHEMA} version {versions}, got {found}")
        rows = tuple(row_of(row) for row in fields.pop("rows"))
        roofs = tuple(Roof(**_tuples(roof)) for roof in fields.pop("roofs", ()))
        fields["version"] = VERSION
        return cls(**_tuples(fields), rows=rows, roofs=roofs)


def row_of(fields: Mapping[str, Any]) -> Row:
    """A row from its JSON fields."""
    results = tuple(Result(**_tuples(result)) for result in fields["results"])
    return Row(**_tuples(fields) | {"results": results})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def environment(command: str, device: "Device | None" = None) -> dict[str, Any]:
    """Machine, versions, commit, date and command: every field of a report but the results.

    ``machine["gpu"]`` holds the properties of the GPU that is measured, such as its driver.
    """
    import torch

    import dsnet_kernels

    facts = dsnet_kernels.info()
    machine = facts["machine"]
    machine["cpu"] = _cpu_name()
    machine.setdefault("cpu_capability", torch.backends.cpu.get_cpu_capability())
    versions = {**facts["versions"], "python": platform.python_version()}
    machine["device"] = "cpu"
    if device is not None and device.gpu:
        machine |= {"device": "gpu", "gpu": dict(device.properties or {})}
        versions |= device.versions or {}
    return {
        "machine": machine,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, ``-dirty`` behind it if files changed; else the installed build's."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        from dsnet_kernels import native

        return (native.build_record() or {}).get("commit")
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def check_writable(path: str | os.PathLike, option: str = "--json") -> None:
    """Raises before minutes are spent on a file of ``option`` that could not be written.

    Raises:
        ValueError: if ``path`` is a folder, or its folder does not exist or is read-only.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {target}")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{option}: no such folder: {target.parent}")
    if not os.access(target.absolute().parent, os.W_OK):
        raise ValueError(f"{option}: cannot write into {target.parent}")


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """``path`` holds either its old content or all of the new, whatever happens meanwhile."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
