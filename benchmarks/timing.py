"""Timing several things in turn, so that what else the machine does falls on all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

SHORTEST = 2e-3
"""A time on the CPU is that of as many calls as fill this many seconds."""
RUNS, WARMUP = 30, 5
"""On a GPU: how many runs count, and how many come before them."""


def on_cpu(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each, `rounds` times, in turn and in any order."""
    counts = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        counts[name] = max(1, int(SHORTEST / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name, run in order.sample(list(runs.items()), len(runs)):
            start = time.perf_counter()
            for _ in range(counts[name]):
                run()
            taken[name].append((time.perf_counter() - start) / counts[name])
    return taken


def on_gpu(calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds of each, one run of each in turn, so that a change of clocks meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARMUP + RUNS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= WARMUP:
                taken[name].append(start.elapsed_time(end))
    return taken
