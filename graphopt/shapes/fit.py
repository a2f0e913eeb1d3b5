"""Integer sequences as expressions: which formula of the symbols gave these sizes?

Exact arithmetic throughout: a candidate counts only if it reproduces every observation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy

Vector = tuple[int, ...]
"""One integer per assignment of the symbols."""

# Bounds of the search; formulas of real models stay far below them.
_MOST_NEAR = 8
_LARGEST_STRIDE = 1024
_MOST_MONOMIALS = 60
_LARGEST_DENOMINATOR = 64
# With fewer observations, a formula of two unknowns would be a guess.
_FEWEST = 4


@dataclass(frozen=True)
class Term:
    """An expression and its value at every assignment."""

    expression: sympy.Expr
    vector: Vector
    base: tuple[sympy.Expr, int, int] | None = None
    """`(x, a, b)` where the expression is floor((x + a) / b): strided layers compose without nesting floors."""


@dataclass(frozen=True)
class Wish:
    """An observation that would tell more about the quotient floor((x + a) / stride)."""

    expression: sympy.Expr
    """x"""
    stride: int | None
    """None where several strides explain the observations: one at a much larger x would tell them apart."""
    low: int = 0
    high: int = 0
    """The range of `a`."""

    def halves(self, x: int) -> bool:
        """Whether observing `x` halves the range."""
        middle = (self.low + self.high + 1) // 2
        return self.stride is not None and (x + middle) % self.stride == 0


class Fitter:
    """Finds expressions over one table of assignments."""

    def __init__(self, columns: Mapping[sympy.Symbol, Sequence[int]], count: int) -> None:
        self.wishes: list[Wish] = []
        self._count = count
        varying = {s: tuple(column) for s, column in columns.items() if len(set(column)) > 1}
        self._symbols = [Term(symbol, column) for symbol, column in varying.items()]
        self._known = {term.vector: term for term in reversed(self._symbols)}
        self._monomials = list(itertools.islice(_monomials(self._symbols), _MOST_MONOMIALS))

    def fit(self, vector: Vector, near: Iterable[Term] = ()) -> Term | None:
        """The simplest expression with these values, or None.

        Args:
            vector: what was observed.
            near: expressions that the sought one is probably made of, such as the sizes of a node's operands.
        """
        if len(set(vector)) == 1:
            return Term(sympy.Integer(vector[0]), vector)
        near = list(near)
        same = next((t for t in near if t.vector == vector), None) or self._known.get(vector)
        if same is not None:
            return same
        local = list({t.vector: t for t in near if len(set(t.vector)) > 1}.values())[:_MOST_NEAR]
        found = _scaled(vector, self._monomials, True)
        if found is None and self._count >= _FEWEST:
            merged = [*_products(near), *_sums(local)]
            # A fraction of a size may as well be its rounded-down quotient, so those are looked at before.
            found = (
                _affine(vector, local, True)
                or _affine(vector, merged, True)
                or _affine(vector, self._symbols, True)
                or self._strided(vector, local)
                or self._strided(vector, self._symbols)
                or _scaled(vector, self._monomials, False)
                or _affine(vector, local, False)
                or _affine(vector, merged, False)
                or _affine(vector, self._monomials, False)
                or self._two_monomials(vector)
            )
        if found is not None:
            self._known[vector] = found
        return found

    def remember(self, term: Term) -> None:
        """Answer with this term wherever its values are observed again."""
        self._known.setdefault(term.vector, term)

    def _strided(self, vector: Vector, terms: Iterable[Term]) -> Term | None:
        """floor((t + a) / stride), if exactly one pair of `a` and `stride` explains all values."""
        for term in terms:
            fitting = []
            for stride in _strides(vector, term.vector):
                low = max(v * stride - t for v, t in zip(vector, term.vector, strict=True))
                high = min(v * stride + stride - 1 - t for v, t in zip(vector, term.vector, strict=True))
                if low <= high:
                    fitting.append((stride, low, high))
            if len(fitting) == 1 and fitting[0][1] == fitting[0][2]:
                return _floor(term, fitting[0][1], fitting[0][0], vector)
            if fitting:
                self.wishes.append(Wish(term.expression, *(fitting[0] if len(fitting) == 1 else (None,))))
        return None

    def _two_monomials(self, vector: Vector) -> Term | None:
        """c1 * m1 + c2 * m2 + c0, which has one unknown more than the other forms."""
        if self._count <= _FEWEST:
            return None
        wanted = _differences(vector)
        steps = [_differences(m.vector) for m in self._monomials]
        for (first, a), (second, b) in itertools.combinations(zip(self._monomials, steps, strict=True), 2):
            pair = _solve(wanted, a, b)
            if pair is None:
                continue
            rest = vector[0] - pair[0] * first.vector[0] - pair[1] * second.vector[0]
            if max(x.denominator for x in (*pair, rest)) > _LARGEST_DENOMINATOR:
                continue
            expression = _number(pair[0]) * first.expression + _number(pair[1]) * second.expression + _number(rest)
            return Term(sympy.expand(expression), vector)
        return None


def _monomials(symbols: Sequence[Term]) -> Iterator[Term]:
    """Products of up to three symbols, simplest first; all of one degree are cut where there are many symbols."""
    for degree in (1, 2, 3):
        if degree > 1 and math.comb(len(symbols) + degree - 1, degree) > _MOST_MONOMIALS:
            return
        for choice in itertools.combinations_with_replacement(symbols, degree):
            yield _product(choice)


def _product(terms: Sequence[Term]) -> Term:
    expression = sympy.Mul(*(t.expression for t in terms))
    return Term(expression, tuple(math.prod(values) for values in zip(*(t.vector for t in terms), strict=True)))


def _products(near: Sequence[Term]) -> Iterator[Term]:
    """Products of some of the operands' sizes: what a reshape merges."""
    varying = [t for t in near if len(set(t.vector)) > 1][:_MOST_NEAR]
    seen: set[Vector] = set()
    for size in range(2, len(varying) + 1):
        for choice in itertools.combinations(varying, size):
            product = _product(choice)
            if product.vector not in seen:
                seen.add(product.vector)
                yield product


def _sums(near: Sequence[Term]) -> Iterator[Term]:
    """Sums of some of the operands' sizes: what a concatenation joins; differences: what a slice leaves."""
    for size in range(2, len(near) + 1):
        for choice in itertools.combinations(near, size):
            values = zip(*(t.vector for t in choice), strict=True)
            yield Term(sympy.Add(*(t.expression for t in choice)), tuple(sum(v) for v in values))
    for a, b in itertools.permutations(near, 2):
        difference = tuple(x - y for x, y in zip(a.vector, b.vector, strict=True))
        yield Term(a.expression - b.expression, difference)


def _scaled(vector: Vector, terms: Iterable[Term], integral: bool) -> Term | None:
    """A multiple of a term, c * t."""
    for term in terms:
        factor = Fraction(vector[0], term.vector[0]) if term.vector[0] else None
        if not factor or factor.denominator > (1 if integral else _LARGEST_DENOMINATOR):
            continue
        if all(v == factor * t for v, t in zip(vector, term.vector, strict=True)):
            return Term(sympy.expand(_number(factor) * term.expression), vector)
    return None


def _affine(vector: Vector, terms: Iterable[Term], integral: bool) -> Term | None:
    """A multiple of a term and a constant, c * t + d."""
    wanted = _differences(vector)
    for term in terms:
        steps = _differences(term.vector)
        pivot = next((i for i, step in enumerate(steps) if step), None)
        if pivot is None:
            continue
        factor = Fraction(wanted[pivot], steps[pivot])
        if any(w != factor * s for w, s in zip(wanted, steps, strict=True)):
            continue
        rest = vector[0] - factor * term.vector[0]
        if not factor or max(factor.denominator, rest.denominator) > (1 if integral else _LARGEST_DENOMINATOR):
            continue
        expression = sympy.expand(_number(factor) * term.expression + _number(rest))
        if factor == 1 and rest.denominator == 1 and term.base is not None:
            inner, shift, stride = term.base
            return Term(expression, vector, (inner, shift + int(rest) * stride, stride))
        return Term(expression, vector)
    return None


def _solve(wanted: Vector, a: Vector, b: Vector) -> tuple[Fraction, Fraction] | None:
    """The factors of a and b in `wanted`, from two rows, if all other rows agree."""
    rows = range(len(wanted))
    i, j = next(((i, j) for i, j in itertools.combinations(rows, 2) if a[i] * b[j] != a[j] * b[i]), (-1, -1))
    if i < 0:
        return None
    determinant = a[i] * b[j] - a[j] * b[i]
    p, q = wanted[i] * b[j] - wanted[j] * b[i], a[i] * wanted[j] - a[j] * wanted[i]
    if any(p * a[k] + q * b[k] != wanted[k] * determinant for k in rows):
        return None
    return Fraction(p, determinant), Fraction(q, determinant)


def _strides(vector: Vector, steps: Vector) -> range:
    """The strides that the overall slope leaves possible."""
    (low, first), (high, last) = (f(zip(steps, vector, strict=True)) for f in (min, max))
    rise, run = last - first, high - low
    if rise < 1 or run < 2:
        return range(0)
    most = _LARGEST_STRIDE if rise == 1 else min(_LARGEST_STRIDE, (run - 1) // (rise - 1))
    return range(max(2, -(-(run + 1) // (rise + 1))), most + 1)


def _floor(term: Term, shift: int, stride: int, vector: Vector) -> Term:
    """floor((t + shift) / stride), where t may be such a floor itself."""
    inner, first, divisor = term.base or (term.expression, 0, 1)
    base = (inner, first + shift * divisor, stride * divisor)
    return Term(sympy.floor((inner + base[1]) / sympy.Integer(base[2])), vector, base)


def _differences(vector: Vector) -> Vector:
    return tuple(v - vector[0] for v in vector[1:])


def _number(value: Fraction) -> sympy.Rational:
    return sympy.Rational(value.numerator, value.denominator)
