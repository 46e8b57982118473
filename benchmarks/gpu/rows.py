"""Rows of a phase: run in order while there is time, and written as they come."""

import dataclasses
import gc
import time
import traceback
from collections.abc import Sequence

from dsnet.bench.suite import Task
from dsnet.bench.table import row_line

from .program import Context

MARGIN = 10.0
"""Seconds at the end of a phase in which no row is started."""


def take(context: Context, tasks: Sequence[Task]) -> str | None:
    """Runs the tasks and returns the reason why a row failed or was left out; None if all passed.

    The results name failed rows under ``failures``, and rows without a time under ``missing``. Both
    are written before each row too: the end of the phase may come within one.
    """
    failures: list[str] = []
    context.results |= {"rows": [], "failures": failures, "missing": []}
    for i, task in enumerate(tasks):
        context.results["missing"] = [each.title for each in tasks[i:]]
        context.write()
        left = context.left() - MARGIN
        if left <= 0:
            break
        start = time.monotonic()
        try:
            row = task.run(until=time.perf_counter() + left)
        except Exception as error:
            # The other rows are measured all the same.
            traceback.print_exc()
            failures.append(f"{task.title}: {type(error).__name__}: {error}".split("\n")[0])
            continue
        finally:
            # Graphs and their memory pools may be part of cycles.
            gc.collect()
        context.results["rows"].append(dataclasses.asdict(row))
        seconds = time.monotonic() - start
        line = "done" if context.dry_run else row_line(row)
        print(f"[{i + 1}/{len(tasks)}] {task.title}: {line} ({seconds:.1f} s)", flush=True)
        if row.failed():
            failures.append(task.title)
    else:
        context.results["missing"] = []
    context.write()
    problems = [f"failed: {'; '.join(failures)}"] if failures else []
    missing = context.results["missing"]
    problems += [f"no time was left for {len(missing)} rows"] if missing else []
    return "; ".join(problems) or None
