"""What is made of a record: its files by name."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dsnet.export import require

from ..gpu.record import Record
from ..gpu.summary import render as render_gpu
from . import markdown, plots, records, spreadsheets

Files = Mapping[str, bytes]


def tables(path: Path) -> Files:
    """Markdown, and CSV of the networks and of the operations where there are any."""
    text, report = path.read_text("utf-8"), records.load(path)
    is_gpu = records.is_gpu(text)
    found = {
        f"{path.stem}.md": (
            render_gpu(Record.from_json(text)) if is_gpu else markdown.render(report)
        ),
        f"{path.stem}_models.csv": spreadsheets.models(report),
        f"{path.stem}_ops.csv": spreadsheets.ops(report),
    }
    return {name: content.encode("utf-8") for name, content in found.items() if content}


def pictures(path: Path) -> Files:
    """SVG and PNG of every picture.

    Raises:
        ImportError: without matplotlib.
    """
    require(("matplotlib",), "plots", "a picture")
    source = digest(path)
    return {
        f"{path.stem}_{picture.name}.{kind}": content
        for picture in plots.listed(records.load(path))
        for kind, content in picture.files(source).items()
    }


def digest(path: Path) -> str:
    """Of a record, which its pictures name as their source."""
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
