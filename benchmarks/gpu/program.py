"""``python -m benchmarks.gpu.program PHASE --result FILE``: one phase, in this process.

A phase is a module of this package with ``run(context)``, which returns None if all is well and
otherwise what is not. Results are written as they come, so that a phase that is ended keeps them.
"""

import argparse
import importlib
import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsnet.bench.report import write_atomically

from .phases import LIMITS


class MissingError(Exception):
    """A tool that the phase needs is not installed."""


@dataclass
class Context:
    """What a phase is told, and where it leaves its results."""

    result: Path
    dry_run: bool
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where tensors live: the CPU stands in for the GPU in a dry run."""
        return "cpu" if self.dry_run else "cuda"

    def write(self, **verdict: str | None) -> None:
        """Saves the results so far."""
        text = json.dumps({"results": self.results, **verdict}, indent=1, allow_nan=False)
        write_atomically(self.result, text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.program")
    parser.add_argument("phase", choices=[*LIMITS, "environment"])
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    context = Context(args.result, args.dry_run)
    module = importlib.import_module(f"benchmarks.gpu.{args.phase}")
    try:
        problem = module.run(context)
        status, detail = ("passed", None) if problem is None else ("failed", problem)
    except MissingError as error:
        status, detail = "missing", str(error)
    except Exception as error:
        traceback.print_exc()
        status, detail = "failed", f"{type(error).__name__}: {error}".split("\n")[0]
    context.write(status=status, detail=detail)
    return 0 if status == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
