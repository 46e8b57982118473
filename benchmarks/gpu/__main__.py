"""Command line of the GPU command; see ``python -m benchmarks.gpu --help``."""

import argparse
import datetime
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .phases import LIMITS, run_phase
from .record import Record, native_sources

ENVIRONMENT_LIMIT = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every phase passed, 1 if one did not, 2 for bad arguments or no GPU."""
    parser = _parser()
    args = parser.parse_args(arguments)
    limits = LIMITS | dict(args.limit)
    names = [name for name in LIMITS if name in args.phases]
    if not args.dry_run and not _sees_gpu():
        parser.error("nvidia-smi shows no GPU; --dry-run goes the same way without one")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {args.out}: {error.strerror}")

    start, phases, facts = time.monotonic(), [], None
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            print(f"{name}: at most {limits[name]:g} s", flush=True)
            phase = run_phase(
                name, args.out, Path(scratch), limit=limits[name], dry_run=args.dry_run
            )
            print(f"  {phase.status}, {phase.seconds:.1f} s. {phase.detail or ''}", flush=True)
            phases.append(phase)
            # From here on the libraries may be loaded: the build, which replaces them, comes first.
            from .summary import render

            facts = facts or _facts(Path(scratch), args.dry_run)
            record = Record(
                dry_run=args.dry_run,
                machine=facts.get("machine", {}),
                gpu=facts.get("gpu"),
                versions=facts.get("versions", {}),
                commit=args.commit or facts.get("commit"),
                native_sources=native_sources(),
                date=date,
                command=shlex.join(["python", "-m", "benchmarks.gpu", *given]),
                seconds=round(time.monotonic() - start, 1),
                phases=tuple(phases),
            )
            (args.out / "record.json").write_text(record.to_json(), "utf-8")
            (args.out / "summary.md").write_text(render(record), "utf-8")
    print(f"{args.out / 'record.json'}, {args.out / 'summary.md'}")
    return 0 if all(phase.status == "passed" for phase in phases) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds for the visible GPU, tests, measures, and writes record.json,"
        " summary.md and a log per phase. The build is made in place, in this checkout.",
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


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    try:
        value = float(seconds)
    except ValueError:
        value = 0.0
    if name not in LIMITS or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected PHASE=SECONDS such as ops=60, got {text!r}")
    return name, value


def _sees_gpu() -> bool:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def _facts(scratch: Path, dry_run: bool) -> dict:
    found = run_phase("environment", scratch, scratch, limit=ENVIRONMENT_LIMIT, dry_run=dry_run)
    if found.detail:
        print(f"environment: {found.detail}", file=sys.stderr)
    return found.results


if __name__ == "__main__":
    sys.exit(main())
