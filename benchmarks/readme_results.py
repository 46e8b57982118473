"""Fills the README's results from the records: ``python -m benchmarks.readme_results``."""

import re
from pathlib import Path

from dsnet.bench.report import Report
from dsnet.bench.table import render

ROOT = Path(__file__).resolve().parent.parent
RECORDS = {
    "results": ROOT / "benchmarks/results/cpu_two_cores.json",
    "peers": ROOT / "benchmarks/results/cpu_two_cores_peers.json",
}
"""Of the blocks between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""


def replaced(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` in the block ``name``."""
    block = rf"(?s)(?<=<!-- {name}:begin -->\n).*(?=<!-- {name}:end -->)"
    return re.sub(block, lambda _: text, readme)


def updated(readme: str) -> str:
    """``readme`` with each record's table in its block."""
    for name, path in RECORDS.items():
        table = render(Report.from_json(path.read_text("utf-8")))
        readme = replaced(readme, name, f"```text\n{table}```\n")
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text("utf-8")), "utf-8")
