"""Running a library that may crash on a hostile model in a process of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# Inferring the shapes of the largest models that we know takes 10 ms.
SECONDS = 2.0
MEMORY = 2 << 30
_BLOCK = 1 << 20
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")


def isolated(work: Callable[[], bytes], seconds: float = SECONDS) -> bytes | None:
    """The result of `work` in a forked process; None where that crashed, raised, or took too long.

    Where processes cannot be forked, `work` runs in this one. It may call no code that waits for other threads.
    """
    if not hasattr(os, "fork"):
        with contextlib.suppress(Exception):
            return work()
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside other threads, for the locks that they may hold; `work` takes none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _work_and_exit(work, writer)
    os.close(writer)
    try:
        return _received(reader, seconds)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work_and_exit(work: Callable[[], bytes], writer: int) -> None:
    """In the child: nothing may return into the code of the parent, or run its handlers."""
    try:
        _limit_memory()
        # What a crash has to say would stand beside the sentence of the parent; handlers of the parent would answer it.
        faulthandler.disable()
        for name in _CRASHES:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        # The last byte tells a complete result from one that a crash cut short.
        for part in (work(), b"\1"):
            view = memoryview(part)
            while view:
                view = view[os.write(writer, view[:_BLOCK]) :]
        os._exit(0)
    except BaseException:  # whatever it is: the parent only learns that there is no result
        os._exit(1)


def _limit_memory() -> None:
    """Let a work that would fill the machine's memory fail instead, where the system can tell it so."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))


def _received(reader: int, seconds: float) -> bytes | None:
    """All bytes until the child closes its end; None where it sent nothing, or not in time."""
    deadline = time.monotonic() + seconds
    blocks: list[bytes] = []
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([reader], [], [], remaining)[0]:
            return None
        block = os.read(reader, _BLOCK)
        if not block:
            data = b"".join(blocks)
            return data[:-1] if data[-1:] == b"\1" else None
        blocks.append(block)
