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
from dsnet.bench.device import CPU, Device, find
from dsnet.bench.models import model_row
from dsnet.bench.ops import op_row
from dsnet.bench.report import Row
from dsnet.bench.row import EAGER_BASELINES
from dsnet.bench.session import check_target, deliver, take, use_threads
from dsnet.bench.suite import Task
from dsnet.commands import at_least, image_size
from dsnet.commands.bench import DEVICES, DTYPES
from dsnet.variants import list_models

NAME = "scaling"
HELP = "time a network along batch, image size (with peak memory) and number of threads"

BATCHES = (1, 2, 4, 8, 16, 32)
GPU_BATCHES = (1, 8, 32, 128, 512)
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
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help=f"(default {listed(BATCHES)}; on a GPU {listed(GPU_BATCHES)})",
    )
    parser.add_argument("--size", type=image_size, nargs="+", default=list(SIZES), metavar="S")
    parser.add_argument(
        "--threads",
        type=at_least(1),
        nargs="+",
        default=list(range(1, len(os.sched_getaffinity(0)) + 1)),
        metavar="N",
        help="(default: from one to one per core)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default float32, on a GPU bfloat16)")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per point")
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")


def run(args: argparse.Namespace) -> int:
    check_target(args.json)
    command = shlex.join(["python", "-m", "benchmarks", *args.argv])
    device = find(args.device)
    tasks = list(points(args, device))
    return deliver(take(command, tasks, dtypes=[_dtype(args, device)], device=device), args.json)


def _dtype(args: argparse.Namespace, device: Device) -> torch.dtype:
    return getattr(torch, args.dtype or ("bfloat16" if device.gpu else "float32"))


def points(args: argparse.Namespace, device: Device = CPU) -> Iterator[Task]:
    """A task per point, curve after curve."""
    common = {
        "dtype": _dtype(args, device),
        "backends": ["auto"],
        "baselines": EAGER_BASELINES,
        "budget": args.budget,
        "device": device,
    }
    network = partial(model_row, args.model, training=False, **common)
    network = partial(network, graphs=device.gpu)
    curves = {"batch": _by_batch, "size": _by_size, "threads": _by_threads}
    for series in dict.fromkeys(args.series):
        if series == "threads" and device.gpu:
            # The CPU's threads only launch.
            continue
        yield from curves[series](args, network, common)


def _by_batch(
    args: argparse.Namespace, network: Callable[..., Row], common: dict[str, Any]
) -> Iterator[Task]:
    device = common["device"]
    for batch in args.batch or (GPU_BATCHES if device.gpu else BATCHES):
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
    def measured(**limits: float) -> Row:
        with use_threads(threads):
            return replace(run(**limits), series=series, threads=threads)

    return Task(title, measured)


def listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _pixels(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
