"""``python -m benchmarks scaling``: time and memory along batch, image size and threads."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsnet.bench.cases import CASES, stages
from dsnet.bench.models import model_row
from dsnet.bench.ops import op_row
from dsnet.bench.report import Row
from dsnet.bench.row import EAGER_BASELINES
from dsnet.bench.session import check_target, deliver, take, use_threads
from dsnet.bench.suite import Task
from dsnet.commands import at_least, image_size
from dsnet.commands.bench import DTYPES
from dsnet.variants import list_models

NAME = "scaling"
HELP = "time a network along batch, image size (with peak memory) and number of threads"

BATCHES = (1, 2, 4, 8, 16, 32)
SIZES = ((224, 224), (320, 320), (448, 448), (640, 640), (800, 1333))
SERIES = ("batch", "size", "threads")
SIZE = (224, 224)
"""Of the images where it is not the size that varies."""
BATCH = 8
"""Images per call where it is the threads that vary; where it is the size, one."""
OPERATION = "co_attention"
"""Measured by itself along the size: its reference stores N×M weights, ours none of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list_models(), default="dsnet_tiny")
    parser.add_argument("--series", choices=SERIES, nargs="+", default=list(SERIES))
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=list(BATCHES), metavar="N")
    parser.add_argument("--size", type=image_size, nargs="+", default=list(SIZES), metavar="S")
    parser.add_argument(
        "--threads",
        type=at_least(1),
        nargs="+",
        default=list(range(1, len(os.sched_getaffinity(0)) + 1)),
        metavar="N",
        help="(default: from one to one per core)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per point")
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")


def run(args: argparse.Namespace) -> int:
    check_target(args.json)
    command = shlex.join(["python", "-m", "benchmarks", *args.argv])
    dtype = getattr(torch, args.dtype)
    return deliver(take(command, list(points(args)), dtypes=[dtype]), args.json)


def points(args: argparse.Namespace) -> Iterator[Task]:
    """A task per point, curve after curve."""
    common = {
        "dtype": getattr(torch, args.dtype),
        "backends": ["auto"],
        "baselines": EAGER_BASELINES,
        "budget": args.budget,
    }
    network = partial(model_row, args.model, training=False, **common)
    curves = {"batch": _by_batch, "size": _by_size, "threads": _by_threads}
    for series in dict.fromkeys(args.series):
        yield from curves[series](args, network, common)


def _by_batch(args: argparse.Namespace, network: Callable[..., Row], _: Any) -> Iterator[Task]:
    for batch in args.batch:
        run = partial(network, batch=batch, size=SIZE)
        yield _point(f"{args.model}, batch {batch}", "batch", run)


def _by_size(
    args: argparse.Namespace, network: Callable[..., Row], common: dict[str, Any]
) -> Iterator[Task]:
    case = next(case for case in CASES if case.operation == OPERATION)
    for size in args.size:
        first = stages(args.model, 1, size)[0]
        run = partial(op_row, case, first, backward=False, memory=True, **common)
        yield _point(f"{OPERATION}, {_pixels(size)}", "size", run)
    for size in args.size:
        run = partial(network, batch=1, size=size, features=True, memory=True)
        yield _point(f"{args.model} backbone, {_pixels(size)}", "size", run)


def _by_threads(args: argparse.Namespace, network: Callable[..., Row], _: Any) -> Iterator[Task]:
    for count in args.threads:
        run = partial(network, batch=BATCH, size=SIZE)
        yield _point(f"{args.model}, {count} threads", "threads", run, count)


def _point(title: str, series: str, run: Callable[[], Row], threads: int | None = None) -> Task:
    def measured() -> Row:
        with use_threads(threads):
            return replace(run(), series=series, threads=threads)

    return Task(title, measured)


def _pixels(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
