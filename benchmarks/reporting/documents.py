"""The blocks of the documents that are filled from records.

A block stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, each on a line.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dsnet.bench.report import Report
from dsnet.bench.table import render

from . import performance, plots, records
from .performance import Sources

ROOT = Path(__file__).resolve().parents[2]

RECORDS = {
    "results": records.FOLDER / "cpu_two_cores.json",
    "peers": records.FOLDER / "cpu_two_cores_peers.json",
    "scaling": records.FOLDER / "cpu_two_cores_scaling.json",
}
"""What the documents are about; the last one may be absent."""

Block = Callable[[Sources], str]


def _whole(report: Report) -> str:
    return f"```text\n{render(report)}```\n"


def _results(found: Sources) -> str:
    """The table, and the picture of the operations."""
    stem = found.paths["results"].stem
    links = [
        f"![{each.caption}](benchmarks/results/{stem}_{each.name}.svg)\n"
        for each in plots.listed(found.results)
        if each.name.startswith("speedup")
    ]
    return "\n".join([_whole(found.results), *links])


README: Mapping[str, Block] = {
    "results": _results,
    "peers": lambda sources: _whole(sources.peers),
}

DOCUMENTS: Mapping[str, Mapping[str, Block]] = {
    "README.md": README,
    "docs/performance.md": performance.BLOCKS,
}


def sources(found: Mapping[str, Path] = RECORDS) -> Sources:
    """The records of the documents."""
    scaling = found["scaling"]
    return Sources(
        results=records.load(found["results"]),
        peers=records.load(found["peers"]),
        scaling=records.load(scaling) if scaling.exists() else None,
        paths=found,
    )


def replaced(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` in the block ``name``.

    Raises:
        ValueError: where there is no such block, or more than one.
    """
    block = rf"(?s)(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)"
    changed, count = re.subn(block, lambda _: text, document)
    if count != 1:
        raise ValueError(f"document: expected one block {name}, got {count}")
    return changed


def updated(name: str, document: str, found: Sources) -> str:
    """The document of that name with every block filled."""
    for block, fill in DOCUMENTS[name].items():
        document = replaced(document, block, fill(found))
    return document
