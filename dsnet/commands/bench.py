"""``dsnet bench``: fused against reference, on this machine."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsnet_kernels.backends import PREFERENCE

from ..variants import list_models
from . import at_least, image_size

if TYPE_CHECKING:
    from ..bench.suite import Settings, Task

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
    add_measurement(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="all",
        help="the operations alone, a network's inference or training step, or all of these"
        " (default); or detection: the first stage's operations on a large image, with peak memory,"
        " which takes minutes and gigabytes",
    )


def add_measurement(
    parser: argparse.ArgumentParser, baselines: Sequence[str] = ("--baselines",)
) -> None:
    """What every command that measures takes: inputs, threads, contenders, where results go.

    Args:
        parser: takes the arguments.
        baselines: how the option that names them is called.
    """
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
        *baselines,
        dest="baselines",
        choices=[*BASELINES, "all"],
        nargs="+",
        help="the reference in these forms, each where it applies (default: the eager ones, compile"
        " for the operations with an affine, sdpa for attention); onnxruntime and openvino, for a"
        " network's inference, need the extra peers",
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
    from ..bench.suite import tasks

    command = shlex.join(["dsnet", *args.argv])
    return measure(
        args, command, lambda common: tasks(replace(common, model=args.model, mode=args.mode))
    )


def measure(
    args: argparse.Namespace, command: str, choose: Callable[["Settings"], Sequence["Task"]]
) -> int:
    """Runs the tasks chosen for the arguments of :func:`add_measurement` and delivers the report.

    Returns:
        The exit status.
    """
    from ..bench.session import check_target, deliver, take

    refuse_absent(args.backends)
    check_target(args.json)
    chosen = settings(args)
    report = take(
        command,
        choose(chosen),
        threads=args.threads,
        dtypes=chosen.dtypes,
        baselines=chosen.baselines or (),
    )
    return deliver(report, args.json)


def settings(args: argparse.Namespace) -> "Settings":
    """Of the arguments of :func:`add_measurement`: all but the network and the mode."""
    import torch

    from ..bench.suite import Settings

    return Settings(
        sizes=args.size,
        dtypes=[getattr(torch, name) for name in args.dtype],
        backends=list(dict.fromkeys(args.backends)),
        batches=args.batch,
        baselines=_baselines(args.baselines),
    )


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
