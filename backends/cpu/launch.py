"""Spreading a softmax over threads: by rows, and where rows are few and long, by parts of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from . import softmax as compiled
from .threads import parts, together

Array = np.ndarray[Any, np.dtype[np.float32]]

# Fewer entries than these are not worth waking a thread for, which takes tens of microseconds; nor are fewer of one
# row, whose threads have to wait for each other between the passes.
GRAIN, PART = 1 << 18, 1 << 20


@dataclass(frozen=True)
class Algorithm:
    """The two compiled forms of one algorithm, with its parameters."""

    sum: Callable[..., tuple[float, float, float]]
    """x [N] -> (shift, e, total), as in `softmax.two_pass_sum`."""
    rows: Callable[..., None]
    """x [R, N], y [R, N] -> y is filled."""
    parameters: tuple[np.float32, ...] = ()
    kept: Callable[..., tuple[float, float, float]] | None = None
    """x [N], y [N] -> as `sum`, with the terms in y: for rows that stay in cache."""


TWO_PASS = Algorithm(compiled.two_pass_sum, compiled.two_pass, kept=compiled.two_pass_kept)
TWO_PASS_RECOMPUTED = Algorithm(compiled.two_pass_sum, compiled.two_pass_recomputed)
ONLINE = Algorithm(compiled.online_sum, compiled.online)
THREE_PASS = Algorithm(compiled.three_pass_sum, compiled.three_pass)


def unified_max(phi: float, low: float, high: float) -> Algorithm:
    """The algorithm with these constants."""
    return Algorithm(
        compiled.unified_max_sum, compiled.unified_max, (np.float32(phi), np.float32(low), np.float32(high))
    )


def softmax(x: Array, y: Array, algorithm: Algorithm) -> None:
    """Fill y [R, N] with the softmax of each row of x [R, N], on as many threads as torch uses.

    Args:
        x: contiguous.
        y: contiguous.
        algorithm: which one.
    """
    count, length = x.shape
    threads = torch.get_num_threads()
    threads = min(threads, x.size // GRAIN if count >= threads else length // PART)
    if threads <= 1:
        algorithm.rows(x, y, *algorithm.parameters)
    elif count >= threads:
        pieces = parts(count, threads)
        together([partial(algorithm.rows, x[p], y[p], *algorithm.parameters) for p in pieces])
    else:
        pieces = parts(length, threads)
        for i in range(count):
            x_parts, y_parts = [x[i, p] for p in pieces], [y[i, p] for p in pieces]
            if algorithm.kept is None or length > compiled.IN_CACHE or not _keep(x_parts, y_parts, algorithm.kept):
                _long_row(x_parts, y_parts, algorithm)


def _long_row(x: Sequence[Array], y: Sequence[Array], algorithm: Algorithm) -> None:
    """One row in parts: each is summed, the sums are joined, and then each is written."""
    found = together([partial(algorithm.sum, part, *algorithm.parameters) for part in x])
    if any(total < 0 for _, _, total in found):
        found = together([partial(compiled.three_pass_sum, part) for part in x])
    shift, e, total = joined(found)
    unit = (np.float32(shift), np.float32(e), total)
    together([partial(compiled.write, a, b, *unit) for a, b in zip(x, y, strict=True)])


def _keep(x: Sequence[Array], y: Sequence[Array], kept: Callable[..., tuple[float, float, float]]) -> bool:
    """One row in parts: the terms of each are left in y, and scaled once the sum is known; whether all could be."""
    found = together([partial(kept, a, b) for a, b in zip(x, y, strict=True)])
    if any(total < 0 for _, _, total in found):
        return False
    _, e, total = joined(found)
    factors = [np.float32(math.ldexp(1 / total, int(own - e))) for _, own, _ in found]
    together([partial(compiled.scale, part, factor) for part, factor in zip(y, factors, strict=True)])
    return True


def joined(sums: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The sum of sums, each total 2^e e^shift, in units of the largest e and the largest shift."""
    counted = [s for s in sums if s[2] != 0]  # the shift of a sum of nothing means nothing
    if not counted:
        return sums[0]
    shift, e = max(s for s, _, _ in counted), max(e for _, e, _ in counted)
    total = sum(t * math.exp(s - shift) * math.ldexp(1.0, int(n - e)) for s, n, t in counted)
    return shift, e, total
