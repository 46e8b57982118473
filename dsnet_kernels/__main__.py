"""``python -m dsnet_kernels [--json]``: what is installed, built and loaded."""

import argparse
import json

from .information import info, render


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsnet_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    facts = info()
    print(json.dumps(facts, indent=2) if parser.parse_args().json else render(facts))


if __name__ == "__main__":
    main()
