"""``python -m benchmarks report``: records as tables and pictures, and in the documents."""

import argparse
from collections.abc import Sequence, Set
from pathlib import Path

from dsnet.bench.report import write_atomically

from ..reporting import documents, files, records

NAME = "report"
HELP = "make Markdown, CSV and pictures of records, and fill the documents' figures from them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "record",
        type=Path,
        nargs="*",
        help="files of --json (default: all in benchmarks/results, beside which their tables and"
        " pictures then lie, and README.md and docs/performance.md are filled too)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside each record")
    parser.add_argument(
        "--no-plots", action="store_true", help="no pictures, which need the extra plots"
    )


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    written = set()
    for path in args.record or records.paths():
        found = dict(files.tables(path))
        if not args.no_plots:
            found |= files.pictures(path)
        for name, content in found.items():
            target = (args.out or path.parent) / name
            write_atomically(target, content)
            written.add(target)
            print(target)
    if not args.record and args.out is None:
        _remove_others(written, ("md", "csv") if args.no_plots else ("md", "csv", "svg", "png"))
        sources = documents.sources()
        for name in documents.DOCUMENTS:
            target = documents.ROOT / name
            text = documents.updated(name, target.read_text("utf-8"), sources)
            write_atomically(target, text)
            print(target)
    return 0


def _remove_others(written: Set[Path], kinds: Sequence[str]) -> None:
    """What earlier records have left beside the present ones."""
    for kind in kinds:
        for path in sorted(set(records.FOLDER.glob(f"*.{kind}")) - written):
            path.unlink()
            print(f"removed {path}")
