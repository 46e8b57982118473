"""``dsnet info``: what is installed, built and loaded."""

import argparse
import json
from importlib import metadata

NAME = "info"
HELP = "report versions, the native build, and the state of each operation's backends"

OPTIONAL = ("pillow", "timm")
"""Distributions of the extras: ``images`` and ``timm``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import dsnet_kernels
    from dsnet_kernels.information import render

    facts = dsnet_kernels.info()
    facts["optional"] = {name: _version(name) for name in OPTIONAL}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(render(facts))
    print("optional packages")
    for name, version in facts["optional"].items():
        print(f"  {name:<18} {version or 'not installed'}")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
