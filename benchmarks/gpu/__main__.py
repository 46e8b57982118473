"""Command line of the GPU command; see ``python -m benchmarks.gpu --help``."""

import argparse
import datetime
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .phases import BUDGET, COMMANDS, LIMITS, Phase, run_phase, shortened
from .record import Record, native_sources, write_atomically
from .summary import render

ENVIRONMENT_LIMIT = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every phase passed, 1 if one did not, 2 for bad arguments or no GPU."""
    parser = _parser()
    args = parser.parse_args(arguments)
    limits = LIMITS | dict(args.limit)
    names = [name for name in LIMITS if name in args.phases]
    if not args.dry_run and not _sees_gpu():
        parser.error("no GPU is visible; --dry-run goes the same way without one")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {args.out}: {error.strerror}")
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(
            out=args.out,
            scratch=Path(scratch),
            dry_run=args.dry_run,
            commit=args.commit,
            command=shlex.join(["python", "-m", "benchmarks.gpu", *given]),
            budget=args.budget,
        )
        for name in names:
            run.phase(name, limits[name])
    print(f"{args.out / 'record.json'}, {args.out / 'summary.md'}")
    return 0 if all(phase.status == "passed" for phase in run.phases) else 1


@dataclass
class Run:
    """Runs phases one by one and writes the record and the summary whenever they change.

    Args:
        out: the folder of the record, the summary and the logs.
        scratch: a folder for the phases' own results.
        dry_run, commit, command: of the record.
        budget: seconds for all phases together.
    """

    out: Path
    scratch: Path
    dry_run: bool
    commit: str | None
    command: str
    budget: float
    phases: list[Phase] = field(default_factory=list)
    facts: dict | None = None
    start: float = field(default_factory=time.monotonic)
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
    )

    def phase(self, name: str, limit: float) -> None:
        """Runs the phase within its limit and the budget left, and adds it to the record."""
        short = shortened(limit, self._left())
        print(f"{name}: at most {short or 0:g} s", flush=True)
        if short is None:
            self._add(
                Phase(name, "not started", 0.0, limit, f"{name}.log", f"{self.budget:g} s are over")
            )
            return
        found = run_phase(
            name,
            self.out,
            self.scratch,
            limit=short,
            dry_run=self.dry_run,
            progress=lambda running: self._write([*self.phases, running]),
        )
        self._add(found)
        if self.facts is None:
            # The first phase may be the build, which replaces the libraries that this loads.
            self.facts = self._environment()
            self._write(self.phases)

    def _left(self) -> float:
        return self.start + self.budget - time.monotonic()

    def _add(self, phase: Phase) -> None:
        print(f"  {phase.status}, {phase.seconds:.1f} s. {phase.detail or ''}", flush=True)
        self.phases.append(phase)
        self._write(self.phases)

    def _environment(self) -> dict:
        limit = shortened(ENVIRONMENT_LIMIT, self._left())
        if limit is None:
            return {}
        found = run_phase(
            "environment", self.scratch, self.scratch, limit=limit, dry_run=self.dry_run
        )
        if found.detail:
            print(f"environment: {found.detail}", file=sys.stderr)
        return found.results

    def _write(self, phases: list[Phase]) -> None:
        facts = self.facts or {}
        record = Record(
            dry_run=self.dry_run,
            machine=facts.get("machine", {}),
            gpu=facts.get("gpu"),
            versions=facts.get("versions", {}),
            commit=self.commit or facts.get("commit"),
            native_sources=native_sources(),
            date=self.date,
            command=self.command,
            seconds=round(time.monotonic() - self.start, 1),
            phases=tuple(phases),
        )
        tables = {path.stem: path.read_text("utf-8") for path in self.scratch.glob("*.md")}
        write_atomically(self.out / "record.json", record.to_json())
        write_atomically(self.out / "summary.md", render(record, tables))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds for the visible GPU, tests, measures, and writes record.json,"
        " summary.md and a log per phase. The build is made in place, in this checkout, and stays"
        " for later commands. Three commands of ten minutes do everything: "
        + "; ".join(f"--phases {','.join(names)}" for names in COMMANDS)
        + ".",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--phases",
        type=_phases,
        default=list(LIMITS),
        metavar="NAME,…",
        help=f"of {','.join(LIMITS)} (default all); they run in this order",
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        action="append",
        default=[],
        metavar="PHASE=SECONDS",
        help=f"(default {' '.join(f'{name}={limit}' for name, limit in LIMITS.items())})",
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=BUDGET,
        metavar="SECONDS",
        help="for all phases together, which shortens the later limits (default %(default)g)",
    )
    parser.add_argument("--commit", help="of the sources, where the checkout does not tell")
    parser.add_argument(
        "--dry-run", action="store_true", help="every phase on the CPU, with a stand-in's times"
    )
    return parser


def _phases(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in LIMITS:
            raise argparse.ArgumentTypeError(f"expected {', '.join(LIMITS)}, got {name!r}")
    return names


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds such as 570, got {text!r}")
    return value


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    try:
        value = _seconds(seconds)
    except argparse.ArgumentTypeError:
        value = 0.0
    if name not in LIMITS or not value:
        raise argparse.ArgumentTypeError(f"expected PHASE=SECONDS such as ops=60, got {text!r}")
    return name, value


def _sees_gpu() -> bool:
    """By nvidia-smi, or by torch where that is absent."""
    code = "import torch; print('GPU' * torch.cuda.is_available())"
    command = ["nvidia-smi", "-L"] if shutil.which("nvidia-smi") else [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


if __name__ == "__main__":
    sys.exit(main())
