"""Running compiled loops on as many threads as torch uses: they hold no lock of Python's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_pool: ThreadPoolExecutor | None = None
_size = 0


def parts(size: int, count: int) -> list[slice]:
    """`count` slices that cover `size` entries, of whole cache lines of 16 where they may be."""
    step = -(-size // count)
    step = -(-step // 16) * 16 if size >= 16 * count * count else step
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return; all but the first run on other threads."""
    global _pool, _size
    if _pool is None or _size < len(tasks) - 1:
        _size = max(len(tasks) - 1, 1)
        # An older pool ends its threads once nobody holds it.
        _pool = ThreadPoolExecutor(_size, thread_name_prefix="graphopt-cpu")
    others = [_pool.submit(task) for task in tasks[1:]]
    return [tasks[0](), *(other.result() for other in others)]


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
