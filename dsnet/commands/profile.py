"""``dsnet profile``: where a network's time goes, before and after."""

import argparse
import shlex
import time

from ..variants import list_models
from . import at_least, image_size
from .bench import DTYPES

NAME = "profile"
HELP = "show where a network's time goes, operation by operation, before and after"

PICTURES = (".svg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Before: eager PyTorch. After: dsnet.optimize, in training the kernels, checked against"
        " float64. Exit status: 0; 1 if after failed its check; 2 after any other error."
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
        "--batch", type=at_least(1), default=8, metavar="N", help="images per call (default 8)"
    )
    parser.add_argument(
        "--size",
        type=image_size,
        default=(224, 224),
        metavar="S",
        help="of the images: 224 (default), or 800x1333 for rows x columns",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default float32)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 or auto (default), which is the GPU where torch sees one",
    )
    parser.add_argument(
        "--training", action="store_true", help="forward, loss and backward, not inference"
    )
    parser.add_argument(
        "--blocks", action="store_true", help="every operation of every block in full, too"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw them, as .svg or .png; needs the extra plots"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from ..bench import report
    from ..bench.profile import Profile, profile, render
    from ..bench.session import use_threads
    from ..devices import resolve

    _check_files(args)
    device = resolve(args.device)
    start = time.monotonic()
    with use_threads(args.threads):
        environment = report.environment(shlex.join(["dsnet", *args.argv]))
        fields = profile(
            args.model,
            batch=args.batch,
            size=args.size,
            dtype=getattr(torch, args.dtype),
            training=args.training,
            device=device,
        )
    result = Profile(**environment, seconds=time.monotonic() - start, **fields)
    if args.json == "-":
        print(result.to_json(), end="")
    else:
        print(render(result, args.blocks), end="")
    if args.json and args.json != "-":
        report.write_atomically(args.json, result.to_json())
    if args.plot:
        from ..bench.profile.plot import write

        write(result, args.plot)
    return 1 if result.failed() else 0


def _check_files(args: argparse.Namespace) -> None:
    """Raises before minutes are spent on what could not be written."""
    from ..bench.report import check_writable

    if args.json == "":
        raise ValueError("--json: expected a file or -, got ''")
    if args.json and args.json != "-":
        check_writable(args.json)
    if args.plot is None:
        return
    if not args.plot.lower().endswith(PICTURES):
        raise ValueError(f"--plot: expected a file ending in .svg or .png, got {args.plot!r}")
    check_writable(args.plot, "--plot")
    from ..bench.profile.plot import matplotlib

    matplotlib()
