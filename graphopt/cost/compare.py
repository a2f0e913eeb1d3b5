"""Two costs side by side."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from graphopt.cost.model import Cost


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    quantity: str
    before: sympy.Expr
    after: sympy.Expr
    ratio: float | None
    """after / before at the reference sizes of the cost before; None where that cannot be said."""


def compare(before: Cost, after: Cost) -> list[Row]:
    """The totals of both; symbols of equal names are the same dimension."""
    sizes = {s.name: size for s, size in (*after.reference.items(), *before.reference.items())}
    return [
        Row(name, old, new, _ratio(_at(old, sizes), _at(new, sizes)))
        for (name, old), new in zip(before.quantities().items(), after.quantities().values(), strict=True)
    ]


def _at(expression: sympy.Expr, sizes: dict[str, int]) -> float | None:
    value = expression.subs({s: sizes[s.name] for s in expression.free_symbols if s.name in sizes})
    return float(value) if value.is_number else None


def _ratio(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return None
    return new / old if old else (1.0 if new == old else None)
