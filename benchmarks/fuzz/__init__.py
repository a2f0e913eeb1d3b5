"""Coverage-guided fuzzing of loading, cleaning up and saving: what is not a GraphOptError is a bug.

`python -m benchmarks.fuzz --executions 1000000` stores `results/fuzz.json`. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

STATE = Path(".fuzz")
EXECUTIONS = 1_000_000


def run(
    executions: int = EXECUTIONS, workers: int | None = None, state: Path = STATE, seed: int = 0, *, stored: bool = True
) -> None:
    """Fuzz, show what was found, and store it.

    Args:
        executions: in all, those of earlier calls with the same state included.
        workers: processes at a time; None means one per core.
        state: the folder of corpus, counts and escapes.
        seed: of all chance.
        stored: whether to write `results/fuzz.json`.
    """
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing needs atheris, which is not installed: pip install 'graphopt[fuzz]'")
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from benchmarks.common import show, store
    from benchmarks.fuzz.campaign import Campaign

    # Ended from outside, it still counts what was done.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    campaign = Campaign(state.resolve(), executions, workers or os.cpu_count() or 1, seed)
    started = time.monotonic()
    columns = (TextColumn("executions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=executions)
        campaign.run(lambda done: progress.update(bar, completed=done))
    result = {"seconds": round(time.monotonic() - started, 1), **campaign.result()}
    rows = [[target, *row.values()] for target, row in result["targets"].items()]
    show("fuzzing", ["target", "executions", "per second and process", "edges", "escapes", "kinds"], rows)
    for facts in result["escapes"]:
        print(f"{facts['count']} x {facts['target']} {facts['kind']} ({facts['input']}): {facts['message'][:100]}")
    if stored:
        store("fuzz", result)
