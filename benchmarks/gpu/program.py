"""``python -m benchmarks.gpu.program PHASE --result FILE``: one phase, in this process.

A phase is a module of this package with ``run(context)``, which returns None if all is well and
otherwise the reason. Results are written as they come, so that a phase that is ended keeps them.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .counts import Count, problems, tabled
from .phases import LIMITS
from .record import write_atomically

MEASURING = ("roofs", "models", "ops")
"""Phases whose results are shown as tables."""


class MissingError(Exception):
    """A tool that the phase needs is not installed."""


@dataclass
class Context:
    """The arguments of a phase, and the place of its results.

    Args:
        result: a JSON file; tables in Markdown lie beside it.
        dry_run: nothing needs a GPU.
        limit: seconds that the phase has.
        results: its figures so far.
        render: makes tables of them.
        start: of the phase, by :func:`time.monotonic`.
    """

    result: Path
    dry_run: bool
    limit: float = float("inf")
    results: dict[str, Any] = field(default_factory=dict)
    render: Callable[[dict[str, Any]], str] | None = None
    start: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """Where tensors live: the CPU stands in for the GPU in a dry run."""
        return "cpu" if self.dry_run else "cuda"

    def left(self) -> float:
        """Seconds until the phase is ended."""
        return self.start + self.limit - time.monotonic()

    def count(self, *counts: Count) -> str | None:
        """Records planned work; returns the counts that are out of bounds."""
        self.results.setdefault("counts", []).extend(tabled(counts))
        for count in counts:
            print(f"{count.name}: {count.value}, expected at most {count.most}", flush=True)
        self.write()
        return problems(counts)

    def write(self, **verdict: str | None) -> None:
        """Saves the results so far; a reader finds the old file or the new one, both whole."""
        text = json.dumps({"results": self.results, **verdict}, indent=1, allow_nan=False)
        write_atomically(self.result, text + "\n")
        if self.render is not None:
            write_atomically(self.result.with_suffix(".md"), self.render(self.results))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.program")
    parser.add_argument("phase", choices=[*LIMITS, "environment"])
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    context = Context(args.result, args.dry_run, args.limit)
    try:
        module = importlib.import_module(f"benchmarks.gpu.{args.phase}")
        if args.phase in MEASURING:
            from .tables import render

            context.render = partial(render, args.phase, dry_run=args.dry_run)
        problem = module.run(context)
        status, detail = ("passed", None) if problem is None else ("failed", problem)
    except MissingError as error:
        status, detail = "missing", str(error)
    except KeyboardInterrupt:
        traceback.print_exc()
        status, detail = "failed", "interrupted"
    except Exception as error:
        traceback.print_exc()
        status, detail = "failed", f"{type(error).__name__}: {error}".split("\n")[0]
    context.write(status=status, detail=detail)
    return 0 if status == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
