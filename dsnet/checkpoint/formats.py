"""From a file to a Python object of names and tensors; the format is read off the content."""

import argparse
import os
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, shown
from .paddle import load_arrays

PADDLE = "Paddle"
_LEGACY_MAGIC = b"\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_HEAD = 32
# What training checkpoints hold beside tensors and plain values.
_ALLOWED = {argparse.Namespace}
_safe_globals_lock = threading.Lock()


def read_file(path: Path) -> tuple[str, Any, dict[str, str]]:
    """(format, content, metadata) of a checkpoint.

    Raises:
        CheckpointError: for a file that is missing, foreign, damaged or holds more than data.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(path, "expected a file")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    format_, reader = _recognise(path, head)
    try:
        content, metadata = reader(path)
    except ImportError:
        raise
    except Exception as error:
        # The parsers raise anything from IndexError to MemoryError on damaged input.
        problem = f"cannot be read as a {format_} checkpoint: {_reason(error)}"
        raise CheckpointError(path, problem) from error
    return format_, content, metadata


def _recognise(path: Path, head: bytes) -> tuple[str, Callable]:
    """The format's name and its reader, from the first bytes."""
    if not head:
        raise CheckpointError(path, "is empty, expected a checkpoint")
    if head.startswith(b"PK\x03\x04"):
        return "PyTorch", _read_torch_archive
    # A safetensors file begins with its header's length, 8 bytes, then the header in JSON.
    if head[4:9] == bytes(4) + b"{":
        return "safetensors", _read_safetensors
    # Pickles from protocol 2 on; torch.save's older format begins with one of its magic number.
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        if _LEGACY_MAGIC in head:
            return "legacy PyTorch", _read_torch
        return PADDLE, lambda path: (load_arrays(path.read_bytes()), {})
    raise CheckpointError(
        path,
        "expected a PyTorch, Paddle or safetensors checkpoint,"
        f" got a file that begins with {bytes(head[:8])!r}",
    )


def _read_torch_archive(path: Path) -> tuple[Any, dict[str, str]]:
    """torch.load, once the archive is known not to unpack to more than its own size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("its entries overlap")
    return _read_torch(path)


def _read_torch(path: Path) -> tuple[Any, dict[str, str]]:
    """Tensors and plain values; training checkpoints also hold their arguments."""
    # The allowed globals are process-wide, and leaving the context would remove a user's own entry.
    with _safe_globals_lock:
        added = list(_ALLOWED.difference(torch.serialization.get_safe_globals()))
        with torch.serialization.safe_globals(added):
            return torch.load(path, map_location="cpu", weights_only=True), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _reason(error: Exception) -> str:
    """One line on ``error``; torch's own text advises loading the file unsafely."""
    if isinstance(error, (LookupError, TypeError, AttributeError, UnicodeError)):
        return f"it is damaged ({type(error).__name__})"
    text = str(error)
    if match := re.search(r"GLOBAL (\S+)", text):
        return f"it refers to {shown(match[1])}, and may hold nothing but tensors and plain values"
    if match := re.search(r"WeightsUnpickler error: *(.+)", text):
        text = match[1]
    lines = text.strip().splitlines()
    return shown(lines[0], 200) if lines else type(error).__name__
