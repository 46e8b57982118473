"""The commit that a package is built from."""

import subprocess
from pathlib import Path


def commit_of(root: Path) -> str | None:
    """The checkout's commit, ``-dirty`` behind it if files changed; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
