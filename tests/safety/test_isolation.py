"""Work in a process of its own: what comes back, and what of it ends the process that asked."""

import os
import signal
import time

import pytest

from graphopt.onnxfile.isolation import isolated


@pytest.mark.parametrize("data", [b"", b"x", b"\1", bytes(range(256)) * 40_000], ids=["none", "one", "mark", "10 MB"])
def test_the_result_comes_back(data):
    assert isolated(lambda: data) == data


def kill():
    os.kill(os.getpid(), signal.SIGSEGV)


def fill():
    return b"x" * (1 << 40)


@pytest.mark.parametrize(
    "work", [kill, fill, lambda: 1 / 0, lambda: os._exit(0), lambda: signal.raise_signal(signal.SIGABRT)]
)
def test_a_crash_stays_there(work, capfd):
    assert isolated(work) is None
    assert capfd.readouterr() == ("", "")


def test_what_hangs_is_ended():
    started = time.monotonic()
    assert isolated(lambda: time.sleep(60) or b"x", seconds=0.2) is None
    assert time.monotonic() - started < 30


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for work in (lambda: b"x", kill):
        isolated(work)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
