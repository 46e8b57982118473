"""``dsnet export``: networks as ONNX, torch.export and AOTInductor files."""

import argparse
import sys
from typing import TYPE_CHECKING

from ..variants import list_models
from . import at_least, image_size

if TYPE_CHECKING:
    from ..model import DSNet

NAME = "export"
HELP = "write a network for inference in another runtime"

FORMATS = ("onnx", "torch", "aoti")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The file is compared with eager PyTorch before it appears. ONNX holds standard operators;"
        " the others need `import dsnet_kernels` before torch.export.load or"
        " torch._inductor.aoti_load_package, and the kernels of this machine."
    )
    parser.add_argument(
        "model", choices=list_models(), metavar="MODEL", help=", ".join(list_models())
    )
    parser.add_argument("output", metavar="OUT", help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: random weights, seeded)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default by the suffix of OUT: onnx, or torch for .pt2; aoti compiles, for .pt2",
    )
    parser.add_argument(
        "--size",
        type=image_size,
        default=(224, 224),
        metavar="S",
        help="of the images: 224, or 800x1333 for rows x columns (default 224)",
    )
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="images per call (default: any number)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="default float32; of ONNX float32 or float16, of the others all but float16",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from ..export import export_model

    error = export_model(
        _model(args),
        args.output,
        format=args.format,
        size=args.size,
        batch=args.batch,
        overwrite=args.force,
    )
    batch = "any batch" if args.batch is None else f"batch {args.batch}"
    rows, columns = args.size
    print(f"wrote {args.output}: {args.model}, {args.dtype}, {batch}, {rows}×{columns} pixels")
    print(f"checked against eager PyTorch: error {error:.2f} of what is allowed")
    return 0


def _model(args: argparse.Namespace) -> "DSNet":
    import torch

    from ..checkpoint import load_checkpoint
    from ..model import create_model

    dtype = getattr(torch, args.dtype)
    if args.weights:
        return load_checkpoint(args.model, args.weights, dtype=dtype)
    print(f"{args.prog}: random weights: the predictions mean nothing", file=sys.stderr)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return create_model(args.model, dtype=dtype)
