"""``dsnet convert``: public checkpoints to safetensors."""

import argparse
import os
from pathlib import Path

NAME = "convert"
HELP = "write a PyTorch or Paddle checkpoint as safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The format and the variant are recognised from the content; nothing in the file can run."
    )
    parser.add_argument("input", metavar="IN", help="checkpoint of any known format")
    parser.add_argument("output", metavar="OUT.safetensors", help="file to write")
    parser.add_argument(
        "--model-ema", action="store_true", help="take a training checkpoint's averaged weights"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import convert_checkpoint

    if Path(args.output).exists() and not args.force:
        raise FileExistsError(f"{args.output}: exists already, --force replaces it")
    source, metadata = convert_checkpoint(
        args.input, args.output, model_ema=args.model_ema, overwrite=args.force
    )
    network, weights = source.architecture, "averaged weights, " if args.model_ema else ""
    print(
        f"read {args.input}: {source.format} format, {source.layout} layout, {weights}"
        f"{source.variant}, {network.num_classes} classes, alpha {network.alpha:g}"
    )
    size = os.path.getsize(args.output)
    print(f"wrote {args.output}: {len(source.tensors)} tensors, {size / 1e6:.1f} MB")
    for name in ("variant", "global_reduction", "source_sha256"):
        print(f"  {name}: {metadata.get(name, 'not recorded')}")
    return 0
