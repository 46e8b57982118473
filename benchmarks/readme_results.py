"""Fills the README's results from the record: ``python benchmarks/readme_results.py``."""

import re
from pathlib import Path

from dsnet.bench.report import Report
from dsnet.bench.table import render

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks/results/cpu_two_cores.json"


def updated(readme: str) -> str:
    """``readme`` with the record's table between the markers."""
    table = render(Report.from_json(RECORD.read_text("utf-8")))
    return re.sub(
        r"(?s)(?<=<!-- results:begin -->\n).*(?=<!-- results:end -->)",
        lambda _: f"```text\n{table}```\n",
        readme,
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text("utf-8")), "utf-8")
