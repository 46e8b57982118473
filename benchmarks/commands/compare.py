"""``python -m benchmarks compare GITREF``: this checkout against another commit."""

import argparse
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dsnet.bench import report
from dsnet.bench.cases import CASES
from dsnet.bench.models import BUDGET
from dsnet.bench.report import Report, Row
from dsnet.bench.session import check_target, progress, use_threads
from dsnet.bench.suite import INFERENCE_BATCHES
from dsnet.commands import at_least, image_size
from dsnet.variants import list_models
from dsnet_kernels.backends import OPERATIONS

from ..comparing import jobs, table
from ..comparing.rounds import MARGIN, compare, confirmed, verdict
from ..comparing.sides import Side, checkout, commit_of

NAME = "compare"
HELP = "build another commit and time this checkout against it, in turn"

ROOT = Path(__file__).resolve().parents[2]
WORK = ("ops", "inference", "training")
OP_BUDGET = 1.0
"""Seconds of timing per row of an operation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "This checkout is taken as it is built. What seems slower is measured again with fresh"
        " processes. Exit status: 1 if something is slower, fails its check here or cannot run."
    )
    names = [name for name in OPERATIONS if any(case.operation == name for case in CASES)]
    parser.add_argument("reference", metavar="GITREF", help="a commit, branch or tag")
    parser.add_argument(
        "--built",
        type=Path,
        metavar="DIR",
        help="a checkout of that commit which is built already (default: build one and remove it)",
    )
    parser.add_argument("--model", choices=list_models(), default="dsnet_tiny")
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--op", choices=names, nargs="+", help="(default: all)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3, 4), nargs="+", default=[1, 2, 3, 4], metavar="N"
    )
    parser.add_argument("--batch", type=at_least(1), default=8, metavar="N")
    parser.add_argument("--size", type=image_size, default=(224, 224), metavar="S")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--margin",
        type=_fraction,
        default=MARGIN,
        help=f"the part by which a time must differ, its whole interval (default {MARGIN})",
    )
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per row")
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    check_target(args.json)
    commit = commit_of(ROOT, args.reference)
    start = time.monotonic()
    with use_threads(args.threads):
        facts = report.environment(shlex.join(["python", "-m", "benchmarks", *args.argv]))
        with _other(args.built, commit) as tree:
            chosen = list(_jobs(args))
            rows = _measure(chosen, tree, args)
            rows = confirmed(
                rows, lambda again: _measure([chosen[i] for i in again], tree, args), args.margin
            )
    result = Report(**facts, seconds=time.monotonic() - start, rows=tuple(rows))
    if args.json == "-":
        print(result.to_json(), end="")
    else:
        print(table.render(result, args.reference, commit, args.margin), end="")
        if args.json:
            report.write_atomically(args.json, result.to_json())
    bad = any(row.failed() or verdict(row, args.margin) == "slower" for row in rows)
    return 1 if bad else 0


def _other(built: Path | None, commit: str) -> AbstractContextManager[Path]:
    """The other side's checkout."""
    if built is None:
        progress(f"building {commit[:12]}")
        return checkout(ROOT, commit)
    found = commit_of(built, "HEAD")
    if found != commit:
        raise ValueError(f"--built: expected a checkout of {commit}, got one of {found}")
    return nullcontext(built.resolve())


def _jobs(args: argparse.Namespace) -> Iterator[jobs.Job]:
    dtype = torch.float32
    if "ops" in args.work:
        yield from jobs.operations(args.model, args.batch, args.size, dtype, args.op, args.stage)
    if "inference" in args.work:
        for batch in sorted({*INFERENCE_BATCHES[:1], args.batch}):
            yield jobs.network(args.model, batch, args.size, dtype, training=False)
    if "training" in args.work:
        yield jobs.network(args.model, args.batch, args.size, dtype, training=True)


def _measure(chosen: Sequence[jobs.Job], tree: Path, args: argparse.Namespace) -> list[Row]:
    """The rows of ``chosen``, by two workers that live as long as that takes."""
    threads, rows = torch.get_num_threads(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        Side(tree, threads) as other,
        Side(ROOT, threads) as here,
    ):
        for index, job in enumerate(chosen):
            progress(f"[{index + 1}/{len(chosen)}] {job.title}")
            budget = args.budget
            if budget is None:
                budget = BUDGET.get(job.facts["work"], OP_BUDGET)
            rows.append(compare(job, other, here, Path(folder), budget))
        progress("")
    return rows
