"""Which sizes to observe a graph at, and which relations between its dimensions the graph insists on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from graphopt.shapes.observe import Observation, Suspect, evaluate

# Offsets from each symbol's smallest size. One size is far from the others, so that what rounds or saturates shows
# itself. The other rows are for graphs that refuse it, and the last two for finding out what a graph accepts.
_OFFSETS = ((0, 1, 2, 7, 9, 521), (0, 1, 2, 7, 9, 67), (0, 1, 2, 5, 11, 19), (0, 1, 2, 3, 4, 5))
COLUMNS = len(_OFFSETS[0])
RANGES = len(_OFFSETS)
# Assignments (column and row) at which a graph is tried first; at which a change to the domain has to hold, so that it
# is no coincidence of sizes; and at which a graph that refuses other sizes is tried again.
_FIRST = ((0, 0), (1, RANGES - 1))
_CONFIRMING = tuple((column, RANGES - 1) for column in range(COLUMNS))
_WIDER = ((0, 0), *((column, RANGES - 2) for column in range(1, COLUMNS)))
# A search tries this many changes (each evaluation ends at the first contradiction) before it gives up.
_BUDGET = 150
# A graph with more nodes that refuse all sizes contradicts itself: it is evaluated as it is.
_MOST_HOPELESS = 16


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
        smallest: int = sympy.prime(row + 2)
        return low + step * (smallest + (offsets[0], *shuffled)[column % len(offsets)])

    def tied(self, symbol: sympy.Symbol, expression: sympy.Expr) -> Domain:
        """This domain with one more relation."""
        relations = {s: e.subs(symbol, expression) for s, e in self.relations.items()}
        return replace(self, relations={**relations, symbol: expression.subs(relations)})

    def scaled(self, symbols: Sequence[sympy.Symbol], low: int, step: int) -> Domain:
        """This domain with larger sizes, or multiples of `step`."""
        return replace(self, scales={**self.scales, **{s: (low, step) for s in symbols}})


class Assignment:
    """Sizes by symbol: one column of a fixed pseudo-random table, so that no two symbols move in step."""

    def __init__(
        self,
        domain: Domain,
        column: int = 0,
        *,
        narrower: int = 0,
        chosen: Mapping[sympy.Symbol, int] | None = None,
    ) -> None:
        self._domain = domain
        self._column = column
        self._offsets = _OFFSETS[narrower]
        self._sizes: dict[sympy.Symbol, int] = dict(chosen or {})
        self.key = f"{column} {narrower if column else 0} {domain.relations} {domain.scales} {chosen}"
        """Equal for equal assignments."""

    @property
    def constant(self) -> bool:
        """Whether no size was asked for so far."""
        return not self._sizes

    def __call__(self, symbol: sympy.Symbol) -> int:
        """The size of a symbol."""
        if symbol not in self._sizes:
            relation = self._domain.relations.get(symbol)
            if relation is None:
                self._sizes[symbol] = self._domain.size(symbol, self._offsets, self._column)
            else:
                self._sizes[symbol] = evaluate(relation, self)
        return self._sizes[symbol]


Observe = Callable[[Assignment, frozenset[fx.Node]], Observation]
Probes = Sequence[tuple[int, int]]
Families = Callable[[Domain, list[sympy.Symbol], frozenset[int]], Iterator[Iterator[Domain]]]

_END = 1 << 60


class Search:
    """Finds sizes at which every node accepts its operands.

    Goes from one refusing node to the next, and keeps the change of the domain that gets furthest.

    Args:
        observe: evaluates the graph up to the first refusal by a node that is not in the given set.
        symbols: the symbols known so far; evaluations may add some.
        nodes: of the graph.
    """

    def __init__(self, observe: Observe, symbols: Callable[[], list[sympy.Symbol]], nodes: Iterable[fx.Node]) -> None:
        self.domain = Domain()
        self.hopeless: frozenset[fx.Node] = frozenset()
        """Nodes that refuse their operands whatever the sizes."""
        self._observe = observe
        self._symbols = symbols
        self._left = _BUDGET
        while (suspect := self._suspect(self.domain, _FIRST)) is not None:
            if not self._improve(suspect, _changes, _CONFIRMING):
                many = len(self.hopeless) >= _MOST_HOPELESS
                self.hopeless |= frozenset(nodes) if many else {suspect.node}

    def widen(self) -> bool:
        """Look once more where some sizes are refused: the graph may want multiples, or it has a maximum.

        Returns:
            Whether the domain has changed.
        """
        suspect = self._suspect(self.domain, _WIDER)
        return suspect is not None and self._improve(suspect, _multiples, _WIDER)

    def _suspect(self, domain: Domain, probes: Probes, least: int = -1) -> Suspect | None:
        """The first refusal at any of the probes; exact only where that is further than `least`."""
        found: Suspect | None = None
        for column, row in probes:
            sizes = Assignment(domain, column, narrower=row)
            suspect = self._observe(sizes, self.hopeless).suspect
            if suspect is not None and (found is None or suspect.position < found.position):
                found = suspect
            if sizes.constant or (found is not None and found.position <= least):
                break
        return found

    def _reached(self, domain: Domain, probes: Probes, least: int) -> int:
        """How far evaluations get; exact only where that is further than `least`."""
        suspect = self._suspect(domain, probes, least)
        return _END if suspect is None else suspect.position

    def _improve(self, suspect: Suspect, families: Families, probes: Probes) -> bool:
        """Change the domain so that the evaluation gets beyond the suspect."""
        best, reached = None, suspect.position
        free = [s for s in self._symbols() if s not in self.domain.relations]
        for family in families(self.domain, free, suspect.sizes):
            for candidate in itertools.islice(family, max(self._left, 0)):
                self._left -= 1
                position = self._reached(candidate, probes, reached)
                if position > reached:
                    best, reached = candidate, position
                if reached == _END:
                    break
            if best is not None:
                self.domain = self._pruned(best, probes, reached)
                return True
        return False

    def _pruned(self, after: Domain, probes: Probes, reached: int) -> Domain:
        """Drop the restrictions of single dimensions that the progress does not need."""
        before = self.domain.scales
        for symbol in [s for s in after.scales if after.scales[s] != before.get(s)]:
            scales = {s: scale for s, scale in after.scales.items() if s != symbol}
            looser = replace(after, scales={**scales, **{s: v for s, v in before.items() if s == symbol}})
            if self._reached(looser, probes, reached - 1) >= reached:
                after = looser
        return after


def _changes(domain: Domain, free: list[sympy.Symbol], hints: frozenset[int]) -> Iterator[Iterator[Domain]]:
    """Families of changes: larger sizes, which do no harm; relations; multiples; single values."""
    free = free[:12]
    pairs = list(itertools.permutations(free, 2))
    one = sympy.Integer(1)
    yield (domain.scaled(free, low, 1) for low in (61, 503))
    yield (domain.tied(b, a) for a, b in itertools.combinations(free, 2))
    yield (
        domain.tied(c, a + b) for c in reversed(free) for a, b in itertools.combinations([s for s in free if s != c], 2)
    )
    yield (domain.tied(b, a + one) for a, b in pairs)
    yield from _multiples(domain, free, hints)
    # Some decoders run a prompt without a cache, or one token with it, and nothing in between.
    yield (domain.tied(s, sympy.Integer(0)) for s in free if "past" in s.name)
    yield (domain.tied(s, one) for s in free)
    yield (domain.tied(s, sympy.Integer(hint)) for s in free for hint in sorted(hints - {1}))


def _multiples(domain: Domain, free: list[sympy.Symbol], hints: frozenset[int]) -> Iterator[Iterator[Domain]]:
    yield (domain.scaled(free, 0, step) for step in (2, 4, 8, 16, 32, 64))
