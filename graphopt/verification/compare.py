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
from graphopt.states import completed
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
    """Each output's difference over all samples: the largest errors, the mean cosine.

    What became of a decoder's caches is left out: it has another length on purpose.
    """
    carried = {state.present for state in b.states} - {state.present for state in a.states}
    compared = [(i, spec.name) for i, spec in enumerate(a.outputs) if spec.name not in carried]
    place = {spec.name: i for i, spec in enumerate(b.outputs)}
    found: dict[str, list[Difference]] = {name: [] for _, name in compared}
    with torch.no_grad():
        for values in data:
            first, second = a.execute(*values), b.execute(*completed(b, a.inputs, values))
            for i, name in compared:
                found[name].append(difference(first[i], second[place[name]]))
    return [_summary(name, rows) for name, rows in found.items()]


def _summary(name: str, rows: list[Difference]) -> OutputDifference:
    return OutputDifference(
        name,
        max(r.max_abs for r in rows),
        max(r.rel_rms for r in rows),
        sum(r.cosine for r in rows) / len(rows),
        all(r.bitwise for r in rows),
    )
