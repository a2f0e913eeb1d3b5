"""Comparing two graphs on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.calibration import Calibration, calibration_for
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.rewrite.report import OutputDifference
from graphopt.verification.numbers import Difference, difference


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; `passed` is None where no tolerance was given."""

    outputs: list[OutputDifference]
    samples: int
    passed: bool | None = None
    reason: str = ""


def compare(
    a: Graph,
    b: Graph,
    inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Run both graphs on the same inputs and measure each output's difference.

    Args:
        a: the reference.
        b: the graph in question; it needs the same inputs and outputs by name.
        inputs: as for `graphopt.calibration.calibration_for`.
        rtol: largest relative RMS difference that passes.
        atol: largest absolute difference that passes (either of the two suffices where both are given).
        seed: for random inputs.

    Raises:
        GraphOptError: the two have other inputs or outputs.
    """
    for what in ("inputs", "outputs"):
        left, right = ([s.name for s in getattr(g, what)] for g in (a, b))
        if sorted(left) != sorted(right):
            raise GraphOptError(f"expected two models with the same {what}, found {left} and {right}")
    data = inputs if isinstance(inputs, Calibration) else calibration_for(a, inputs, seed=seed)
    outputs = measure(a, b, data)
    if rtol is None and atol is None:
        return Comparison(outputs, len(data))
    missed = [o for o in outputs if not _within(o, rtol, atol)]
    reason = "; ".join(f"{o.name}: relative RMS {o.rel_rms:.3g}, largest difference {o.max_abs:.3g}" for o in missed)
    return Comparison(outputs, len(data), not missed, reason)


def _within(output: OutputDifference, rtol: float | None, atol: float | None) -> bool:
    return (rtol is not None and output.rel_rms <= rtol) or (atol is not None and output.max_abs <= atol)


def measure(a: Graph, b: Graph, data: Iterable[tuple[Any, ...]]) -> list[OutputDifference]:
    """Each output's difference over all samples: the largest errors, the mean cosine."""
    order = [[s.name for s in b.outputs].index(s.name) for s in a.outputs]
    feeds = [[s.name for s in a.inputs].index(s.name) for s in b.inputs]
    found: list[list[Difference]] = [[] for _ in a.outputs]
    with torch.no_grad():
        for values in data:
            first, second = a.execute(*values), b.execute(*(values[i] for i in feeds))
            for i, expected in enumerate(first):
                found[i].append(difference(expected, second[order[i]]))
    return [_summary(spec.name, rows) for spec, rows in zip(a.outputs, found, strict=True)]


def _summary(name: str, rows: list[Difference]) -> OutputDifference:
    return OutputDifference(
        name,
        max(r.max_abs for r in rows),
        max(r.rel_rms for r in rows),
        sum(r.cosine for r in rows) / len(rows),
        all(r.bitwise for r in rows),
    )
