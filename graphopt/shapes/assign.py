"""Which sizes to observe a graph at, and which relations between its dimensions the graph insists on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from graphopt.shapes.observe import Observation, evaluate

# Both parities and all remainders of 3 and 4 occur, and one value lies far from the others.
_OFFSETS = (0, 1, 2, 7, 9, 67)
ROUNDS = len(_OFFSETS)
# For graphs in which a dimension has a maximum.
_NEAR_OFFSETS = (0, 1, 2, 3, 4, 5)
# A search tries this many evaluations (each ends at the first contradiction) before it gives up.
_BUDGET = 150


@dataclass(frozen=True)
class Domain:
    """The sizes that a graph accepts, as far as the search found out."""

    relations: Mapping[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    """Dimensions that follow from others."""
    scales: Mapping[sympy.Symbol, tuple[int, int]] = field(default_factory=dict)
    """Smallest size and step, where they are not the default."""
    order: dict[sympy.Symbol, int] = field(default_factory=dict)
    """The row of the table of sizes that each symbol uses; grows as symbols turn up."""

    def size(self, symbol: sympy.Symbol, offsets: tuple[int, ...], column: int) -> int:
        """The size of a symbol in one assignment."""
        row = self.order.setdefault(symbol, len(self.order))
        low, step = self.scales.get(symbol, (0, 1))
        shuffled = random.Random(row).sample(offsets[1:], len(offsets) - 1)
        return low + step * (int(sympy.prime(row + 2)) + (offsets[0], *shuffled)[column % len(offsets)])

    def tied(self, symbol: sympy.Symbol, expression: sympy.Expr) -> Domain:
        """This domain with one more relation."""
        relations = {s: e.subs(symbol, expression) for s, e in self.relations.items()}
        return replace(self, relations={**relations, symbol: expression.subs(relations)})

    def scaled(self, symbols: tuple[sympy.Symbol, ...], low: int, step: int) -> Domain:
        """This domain with larger sizes, or multiples of `step`."""
        return replace(self, scales={**self.scales, **{s: (low, step) for s in symbols}})


class Assignment:
    """Sizes by symbol: one column of a fixed pseudo-random table, so that no two symbols move in step."""

    def __init__(
        self, domain: Domain, column: int = 0, *, near: bool = False, chosen: Mapping[sympy.Symbol, int] | None = None
    ) -> None:
        self._domain = domain
        self._column = column
        self._offsets = _NEAR_OFFSETS if near else _OFFSETS
        self._sizes = dict(chosen or {})

    def __call__(self, symbol: sympy.Symbol) -> int:
        """The size of a symbol."""
        if symbol not in self._sizes:
            relation = self._domain.relations.get(symbol)
            if relation is None:
                self._sizes[symbol] = self._domain.size(symbol, self._offsets, self._column)
            else:
                self._sizes[symbol] = evaluate(relation, self)
        return self._sizes[symbol]


def settle(
    observe: Callable[[Assignment, frozenset[fx.Node] | None], Observation], symbols: Callable[[], list[sympy.Symbol]]
) -> tuple[Domain, frozenset[fx.Node]]:
    """Find sizes at which every node accepts its operands.

    Goes from one refusing node to the next, and keeps the change of the domain that gets furthest.

    Args:
        observe: evaluates the graph; given a set of nodes, it stops at the first refusal outside of it.
        symbols: the symbols known so far; evaluations may add some.

    Returns:
        The domain, and the nodes that refuse their operands whatever the sizes.
    """
    domain, hopeless, left = Domain(), frozenset[fx.Node](), _BUDGET
    while True:
        seen = observe(Assignment(domain), hopeless)
        refusing = [s for s in seen.suspects if s.node not in hopeless]
        if not refusing:
            return domain, hopeless
        first, best, reached = refusing[0], None, refusing[0].position
        free = [s for s in symbols() if s not in domain.relations]
        for family in _changes(domain, free, first.sizes):
            for candidate in itertools.islice(family, left):
                left -= 1
                later = [s for s in observe(Assignment(candidate), hopeless).suspects if s.node not in hopeless]
                position = later[0].position if later else -1
                if position < 0 or position > reached:
                    best, reached = candidate, position
                if position < 0:
                    return candidate, hopeless
            if best is not None:
                break
        if best is None:
            hopeless |= {first.node}
        else:
            domain = best


def _changes(domain: Domain, free: list[sympy.Symbol], hints: frozenset[int]) -> Iterator[Iterator[Domain]]:
    """Families of changes, the most telling first: relations, then ranges, then single values."""
    free = free[:12]
    pairs = list(itertools.permutations(free, 2))
    everything = tuple(free)
    yield (domain.tied(b, a) for a, b in itertools.combinations(free, 2))
    yield (
        domain.tied(c, a + b)
        for c in reversed(free)
        for a, b in itertools.combinations([s for s in free if s != c], 2)
    )
    yield (domain.tied(b, a + 1) for a, b in pairs)
    yield (domain.scaled(everything, low, 1) for low in (29, 97, 211, 503))
    yield (domain.scaled(everything, 0, step) for step in (2, 4, 8, 16, 32, 64))
    yield (domain.tied(s, sympy.Integer(1)) for s in free)
    yield (domain.tied(s, sympy.Integer(hint)) for s in free for hint in sorted(hints - {1}))
    yield (domain.scaled((s,), 0, step) for s in free for step in (2, 4, 8, 16, 32, 64))
