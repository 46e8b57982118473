"""``dsnet models``: the published variants, their parameters and arithmetic."""

import argparse
import json

from . import at_least

NAME = "models"
HELP = "list the variants with their parameters and multiply-accumulates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--size", type=at_least(32), default=224, help="of the image (default 224)")
    parser.add_argument(
        "--global-reduction",
        type=at_least(1),
        nargs=4,
        metavar="R",
        help="how many times coarser each stage's global grid is (default 8 4 2 1, the paper's;"
        " the public checkpoints have 8 4 2 2)",
    )


def run(args: argparse.Namespace) -> int:
    from ..macs import count_macs
    from ..model import create_model
    from ..variants import PAPER_REDUCTION, VARIANTS

    reduction = tuple(args.global_reduction or PAPER_REDUCTION)
    rows = []
    for name, variant in VARIANTS.items():
        model = create_model(name, global_reduction=reduction, device="meta").eval()
        rows.append(
            {
                "name": name,
                "depths": variant.depths,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "macs": count_macs(model, args.size),
            }
        )
    if args.json:
        facts = {"size": args.size, "global_reduction": reduction, "models": rows}
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{args.size}×{args.size} pixels, global reduction {', '.join(map(str, reduction))}")
    print(f"{'model':<14}{'blocks':<14}{'parameters':>12}{'GMAC':>10}")
    for row in rows:
        blocks = ", ".join(map(str, row["depths"]))
        print(f"{row['name']:<14}{blocks:<14}{row['parameters']:>12,}{row['macs'] / 1e9:>10.3f}")
    return 0
