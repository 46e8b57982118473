"""The two sides: a checkout of a commit, built, and the process that runs its calls."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..gpu.build import COMMAND as BUILD

WORKER = Path(__file__).with_name("worker.py")

PATIENCE = 10.0
"""Seconds that a worker has to end once its stdin is closed."""


class SideError(RuntimeError):
    """A checkout that cannot be made, built or run."""


def commit_of(root: Path, reference: str) -> str:
    """The full name of the commit.

    Raises:
        SideError: where ``reference`` names none.
    """
    return _git(root, "rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}")


@contextlib.contextmanager
def checkout(root: Path, commit: str) -> Iterator[Path]:
    """A worktree of ``commit`` with its libraries built, both gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dsnet-compare-") as folder:
        tree = Path(folder) / "tree"
        _git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            _build(tree)
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _build(tree: Path) -> None:
    # GPU kernels take no part, and most of the time.
    environment = {"DSNET_CUDA": "0"} | os.environ
    done = subprocess.run(
        BUILD,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        last = " | ".join(done.stdout.strip().splitlines()[-5:])
        raise SideError(f"the build of the other commit failed: {last}")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SideError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


class Side:
    """The worker of a checkout. Use it in a ``with`` statement."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root, self.threads = root, threads
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root), str(threads)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._read()

    def load(self, job: Path, values: Path) -> dict[str, str]:
        """Takes the call of ``job``, saves what it computes; returns the chosen backends."""
        return self._ask(load=str(job), values=str(values))["chosen"]

    def time(self, repeats: int) -> float:
        """Seconds of one call, the mean of so many."""
        return self._ask(repeats=repeats)["seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # The answer, which is missing, tells.
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SideError(f"the worker of {self.root} ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
