"""Measuring two models side by side: alternating runs in one process, medians, and how far they spread.

A machine's speed drifts with its temperature and its neighbours. Runs of the two models alternate, so that
both see the same drift, and the ratio is taken pair by pair, so that it cancels.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# One sample lasts at least this long (seconds): shorter ones measure the clock and the interpreter.
SHORTEST_SAMPLE = 2e-3
WARM_UP = 3


class Session(Protocol):
    """What can be measured: an onnxruntime `InferenceSession`, or anything that runs like one."""

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], /) -> Sequence[Any]:
        """Compute the outputs."""


Loop = Callable[[Iterable[int], int | None, str], Iterator[int]]


@dataclass(frozen=True)
class Spread:
    """A measured quantity: its median, the quartiles around it, and the extremes."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return {
            "median": self.median,
            "q1": self.lower,
            "q3": self.upper,
            "min": self.smallest,
            "max": self.largest,
        }


@dataclass(frozen=True)
class Timing:
    """Seconds per run of each sample; `b` is empty where only one model was measured."""

    a: tuple[float, ...]
    b: tuple[float, ...] = ()
    repeats: tuple[int, ...] = field(default=(1, 1))
    """How many runs make one sample, of A and of B."""

    @property
    def ratio(self) -> Spread | None:
        """Time of A over time of B, pair by pair: above 1 where B is faster."""
        if not self.b:
            return None
        return Spread.of([x / y for x, y in zip(self.a, self.b, strict=True)])

    def verdict(self) -> str:
        """The comparison in words; a slow-down is stated as plainly as a speed-up."""
        ratio = self.ratio
        if ratio is None:
            return ""
        if ratio.lower <= 1 <= ratio.upper:
            return "no difference beyond the noise"
        if ratio.median > 1:
            return f"B is {ratio.median:.2f} times as fast as A"
        return f"B is slower: it takes {1 / ratio.median:.2f} times as long as A"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: spreads, and every sample."""
        ratio = self.ratio
        data: dict[str, Any] = {"a_seconds": Spread.of(self.a).to_dict(), "a_samples": list(self.a)}
        if ratio is not None:
            data |= {
                "b_seconds": Spread.of(self.b).to_dict(),
                "b_samples": list(self.b),
                "ratio": ratio.to_dict(),
            }
            data["verdict"] = self.verdict()
        return {**data, "runs_per_sample": list(self.repeats[: 1 + bool(self.b)])}


def _plain(items: Iterable[int], total: int | None, text: str) -> Iterator[int]:
    yield from items


def bench_one(session: Session, feeds: Mapping[str, Any], runs: int = 20, loop: Loop = _plain) -> Timing:
    """Measure one model; see `bench_pair`."""
    repeats = _repeats(session, feeds)
    samples = [_sample(session, feeds, repeats) for _ in loop(range(_at_least_one(runs)), runs, "Measuring")]
    return Timing(tuple(samples), repeats=(repeats,))


def bench_pair(
    session_a: Session, session_b: Session, feeds: Mapping[str, Any], runs: int = 20, loop: Loop = _plain
) -> Timing:
    """Measure two models on the same inputs, taking turns; who goes first alternates too.

    Args:
        session_a: the reference.
        session_b: the model in question.
        feeds: inputs by name, for both.
        runs: how many pairs of samples.
        loop: wraps the loop over them in a progress bar: (items, total, text).

    Raises:
        ValueError: `runs` is below 1.
    """
    repeats = _repeats(session_a, feeds), _repeats(session_b, feeds)
    a: list[float] = []
    b: list[float] = []
    for i in loop(range(_at_least_one(runs)), runs, "Measuring"):
        turns = [(session_a, repeats[0], a), (session_b, repeats[1], b)]
        for session, count, samples in turns if i % 2 == 0 else reversed(turns):
            samples.append(_sample(session, feeds, count))
    return Timing(tuple(a), tuple(b), repeats)


def _at_least_one(runs: int) -> int:
    if runs < 1:
        raise ValueError(f"expected at least 1 run, got {runs}")
    return runs


def _repeats(session: Session, feeds: Mapping[str, Any]) -> int:
    """Warm up, and find how many runs fill one sample."""
    fastest = min(_sample(session, feeds, 1) for _ in range(WARM_UP))
    return max(1, math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-7)))


def _sample(session: Session, feeds: Mapping[str, Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        session.run(None, feeds)
    return (time.perf_counter() - started) / repeats


def machine() -> dict[str, Any]:
    """What a measured time depends on, beside the versions of the packages."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
