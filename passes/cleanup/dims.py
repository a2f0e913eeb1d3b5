"""Sizes as integers or sympy expressions, and the few operations on them that shapes need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy

Dim = Any
"""An `int` where the size is static, else a sympy expression over the sizes that an input may vary in."""
Shape = tuple[Dim, ...]
Atom = Callable[[int], Dim]
"""Makes the symbol for an axis whose size is not known."""


def plain(value: Any) -> Dim:
    """`value` as an `int` wherever it is one."""
    return value if isinstance(value, int) else int(value) if value.is_Integer else value


def symbol(name: str) -> sympy.Symbol:
    """A size; zero is one, as tensors may be empty."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements."""
    return plain(math.prod(dims, start=1))


def static(dims: Sequence[Dim] | None) -> bool:
    """Whether all sizes are integers."""
    return dims is not None and all(isinstance(d, int) for d in dims)


def quotient(a: Dim, b: Dim) -> Dim | None:
    """`a / b` where it is a whole number for all sizes, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if b == 0:
        return None
    found = sympy.expand(sympy.sympify(a) / b)
    whole = all(sympy.fraction(term)[1] == 1 for term in sympy.Add.make_args(found))
    return plain(found) if whole else None


def equal(a: Dim, b: Dim) -> bool | None:
    """Whether two sizes are equal for all inputs (True), for none (False), or for some (None)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = sympy.sympify(a) - b
    if difference == 0:
        return True
    return False if difference.is_positive or difference.is_negative else None


def broadcast(shapes: Sequence[Shape | None], atom: Atom) -> Shape | None:
    """The shape that numpy-style broadcasting gives; None where an operand's rank is unknown."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max(map(len, known), default=0)
    padded = [(1,) * (rank - len(s)) + s for s in known]
    return tuple(_joint([s[axis] for s in padded], axis, atom) for axis in range(rank))


def _joint(dims: Sequence[Dim], axis: int, atom: Atom) -> Dim:
    others = {d for d in dims if d != 1}
    if len(others) <= 1:
        return others.pop() if others else 1
    # A static size above one wins: the others must be one or the same for the node to run at all.
    fixed = [d for d in others if isinstance(d, int)]
    return fixed[0] if len(fixed) == 1 else atom(axis)
