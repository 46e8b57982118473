"""``dsnet bench``: fused against reference, on this machine."""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator

from dsnet_kernels.backends import PREFERENCE

from ..variants import list_models
from . import at_least, image_size

NAME = "bench"
HELP = "time the fused operations and the networks against the reference"

MODES = ("all", "ops", "inference", "training", "detection")
DTYPES = ("float32", "bfloat16", "float16")
BASELINES = {
    "nchw": "eager_nchw",
    "channels_last": "eager_channels_last",
    "compile": "compile",
    "sdpa": "sdpa",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
ON_CPU = ("cpu", "sdpa", "reference")
"""Backends that take CPU tensors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Every contender is checked against float64 before it is timed. Exit status: 0; 1 if one of"
        " ours failed its check or could not run; 2 after any other error."
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="dsnet_tiny",
        choices=list_models(),
        metavar="MODEL",
        help=f"{', '.join(list_models())} (default dsnet_tiny)",
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="images per call (default: operations and training 8, inference 1 and 8, detection 1)",
    )
    parser.add_argument(
        "--size",
        type=image_size,
        nargs="+",
        metavar="S",
        help="of the images: 224, or 800x1333 for rows x columns (default 224; detection 800x1333)",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--backends",
        type=cpu_backend,
        choices=("auto", *ON_CPU),
        nargs="+",
        default=["auto"],
        help="ours, on CPU tensors (default auto); in a network, operations without a kernel of a"
        " named backend run as the reference",
    )
    parser.add_argument(
        "--baselines",
        choices=[*BASELINES, "all"],
        nargs="+",
        help="the reference in these forms, each where it applies (default: the eager ones, compile"
        " for the operations with an affine, sdpa for attention); onnxruntime and openvino, for a"
        " network's inference, need the extra peers",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="all",
        help="the operations alone, a network's inference or training step, or all of these"
        " (default); or detection: the first stage's operations on a large image, with peak memory,"
        " which takes minutes and gigabytes",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")


def cpu_backend(text: str) -> str:
    """An argument type: a backend's name, refused if it takes no CPU tensors."""
    if text in set(PREFERENCE) - set(ON_CPU):
        raise argparse.ArgumentTypeError(
            f"{text} takes no CPU tensors, which this benchmark times"
            " (for a GPU: python -m benchmarks.gpu in the repository)"
        )
    return text


def run(args: argparse.Namespace) -> int:
    from ..bench import report
    from ..bench.peers import versions
    from ..bench.table import render

    refuse_absent(args.backends)
    if args.json == "":
        raise ValueError("--json: expected a file or -, got ''")
    to_stdout = args.json == "-"
    if args.json and not to_stdout:
        report.check_writable(args.json)
    start = time.monotonic()
    with threads(args.threads):
        environment = report.environment(shlex.join(["dsnet", *args.argv]))
        environment["versions"] |= versions(_baselines(args.baselines) or ())
        rows = tuple(_rows(args))
    result = report.Report(**environment, seconds=time.monotonic() - start, rows=rows)
    if to_stdout:
        print(result.to_json(), end="")
    else:
        print(render(result), end="")
        if args.json:
            report.write_atomically(args.json, result.to_json())
    return 1 if any(row.failed() for row in rows) else 0


def refuse_absent(backends: list[str]) -> None:
    """Raises ValueError for a backend named that has no kernel here, with the reason."""
    import dsnet_kernels

    for name in backends:
        if name == "auto" or name in dsnet_kernels.available_backends():
            continue
        states = dsnet_kernels.info()["operations"].items()
        reasons = dict.fromkeys(state[name] for _, state in states)
        raise ValueError(f"--backends: {name} cannot run here: {'; '.join(reasons)}")


def _baselines(names: list[str] | None) -> list[str] | None:
    """Their names in a report; None for the defaults."""
    if names is None:
        return None
    return [BASELINES[name] for name in (BASELINES if "all" in names else names)]


def _rows(args: argparse.Namespace) -> Iterator:
    import torch

    from ..bench.suite import Settings, tasks

    chosen = tasks(
        Settings(
            model=args.model,
            sizes=args.size,
            dtypes=[getattr(torch, name) for name in args.dtype],
            backends=list(dict.fromkeys(args.backends)),
            batches=args.batch,
            baselines=_baselines(args.baselines),
            mode=args.mode,
        )
    )
    try:
        for index, task in enumerate(chosen):
            _progress(f"[{index + 1}/{len(chosen)}] {task.title}")
            yield task.run()
    finally:
        _progress("")


def _progress(text: str) -> None:
    """Replaces the last line on a terminal; says nothing elsewhere."""
    if sys.stderr.isatty():
        # The escape sequence clears the rest of the line.
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within it PyTorch has so many threads; None leaves them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
