"""Shapes of all values of a graph, observed at a few sizes and expressed in the model's own symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.shapes.assign import COLUMNS, RANGES, Assignment, Search
from graphopt.shapes.express import Expressions, SymbolicValue
from graphopt.shapes.fit import Wish
from graphopt.shapes.observe import Evaluator, Observation, evaluate
from graphopt.shapes.symbols import SymbolTable, input_shapes

# Each further observation halves the doubt about where a strided layer starts to round.
_MOST_REFINEMENTS = 10
_SEARCHED_SIZES = 2100
# How much larger a size is tried to tell strides apart.
_FURTHER = 8


@dataclass(frozen=True)
class Shapes:
    """The shapes of a graph's values.

    Expressions hold for sizes of two and more: where a size of one would broadcast, they still state the general case.
    """

    symbols: Mapping[str, sympy.Symbol]
    """By the name that the model gives (`batch`, `sequence_length`), `<input>_<axis>`, or `d17` for a size that
    nothing known decides."""
    unknown: Mapping[fx.Node, str]
    """The nodes whose shape is unknown, and why."""
    relations: Mapping[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    """Dimensions that the model names but that the graph accepts only as a function of others."""
    steps: Mapping[sympy.Symbol, tuple[int, int]] = field(default_factory=dict)
    """Smallest observed size and step of a dimension that the graph accepts only in multiples."""
    open: frozenset[sympy.Symbol] = frozenset()
    """Those of `symbols` that are no dimension of an input."""
    _values: Mapping[fx.Node, tuple[SymbolicValue | None, ...]] = field(default_factory=dict, repr=False)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...] | None:
        """The shape of a node's one tensor; None if it has none, several, or an unknown one."""
        one = self._one(node)
        return None if one is None else one.shape

    def dtype(self, node: fx.Node) -> torch.dtype | str | None:
        """The element type of a node's one tensor."""
        one = self._one(node)
        return None if one is None else one.dtype

    def values(self, node: fx.Node) -> tuple[sympy.Expr, ...] | None:
        """The elements of a small integer tensor or Python integer, where shape arithmetic knows them."""
        one = self._one(node)
        return None if one is None else one.values

    def outputs(self, node: fx.Node) -> tuple[SymbolicValue | None, ...]:
        """All tensors of a node that returns several; None stands for an unknown one."""
        return self._values.get(node, ())

    def at(self, sizes: Mapping[Any, int]) -> dict[fx.Node, tuple[int | None, ...] | None]:
        """The shapes at given sizes; None for what depends on a symbol that `sizes` leaves out.

        Args:
            sizes: by symbol or by name.

        Raises:
            GraphOptError: a name is none of the model's.
        """
        known = self.resolve(sizes)
        memo: dict[sympy.Expr, int | None] = {}

        def size(dim: sympy.Expr) -> int | None:
            if dim not in memo:
                memo[dim] = evaluate(dim, known.__getitem__) if dim.free_symbols <= known.keys() else None
            return memo[dim]

        shapes = {node: self.shape(node) for node in self._values}
        return {node: None if s is None else tuple(map(size, s)) for node, s in shapes.items()}

    def resolve(self, sizes: Mapping[Any, int]) -> dict[sympy.Symbol, int]:
        """Sizes by symbol from sizes by symbol or name.

        Raises:
            GraphOptError: a name is none of the model's, or a size contradicts a relation.
        """
        names = {s.name: s for s in self.symbols.values()} | dict(self.symbols)
        result: dict[sympy.Symbol, int] = {}
        for key, size in sizes.items():
            symbol = names.get(str(key)) if not isinstance(key, sympy.Symbol) else key
            if symbol not in names.values():
                known = ", ".join(sorted(self.symbols)) or "none"
                raise GraphOptError(f"the model has no dimension {str(key)!r}; its dynamic dimensions are {known}")
            result[symbol] = int(size)
        for symbol, relation in self.relations.items():
            if not relation.free_symbols <= result.keys():
                continue
            size = evaluate(relation, result.__getitem__)
            if result.setdefault(symbol, size) != size:
                raise GraphOptError(
                    f"expected {symbol} = {relation} = {size}, which the graph insists on, but got {result[symbol]}"
                )
        return result

    def _one(self, node: fx.Node) -> SymbolicValue | None:
        values = self._values.get(node, ())
        return values[0] if len(values) == 1 else None


def shapes_of(graph: Graph) -> Shapes:
    """The shape of every value in the symbols of the graph's inputs.

    The graph is evaluated at a few sizes with tensors on the meta device (weights are not read), and each dimension
    gets an expression that reproduces all observations: a polynomial or a rounded-down quotient.
    """
    table = SymbolTable()
    inputs = input_shapes(graph.inputs, table)
    named = set(table.by_display.values())
    evaluator = Evaluator(graph, inputs, table)
    run = _Run(graph, evaluator, table)
    values, unknown = run.expressions().finished(table)
    domain = run.domain
    declared = {
        node: tuple(dim.subs(domain.relations) for dim in shape)
        for node, shape in zip(graph.placeholders, inputs, strict=False)
        if shape is not None
    }
    for node, shape in declared.items():
        values[node] = tuple(SymbolicValue(shape, v.dtype) for v in values.get(node, ()) if v is not None)
    return Shapes(
        symbols=dict(table.by_display),
        unknown=unknown,
        relations=domain.relations,
        steps={s: scale for s, scale in domain.scales.items() if scale[1] > 1},
        open=frozenset(table.by_display.values()) - named,
        _values=values,
    )


class _Run:
    """The observations of one graph."""

    def __init__(self, graph: Graph, evaluator: Evaluator, table: SymbolTable) -> None:
        self._graph = graph
        self._evaluator = evaluator
        self._table = table
        self._seen: list[tuple[Assignment, Observation]] = []
        self._memo: dict[str, Observation] = {}
        self._search = Search(self._evaluate, lambda: list(table.by_display.values()), graph.nodes)
        self.domain = self._search.domain

    def expressions(self) -> Expressions:
        """Observe until the expressions are settled."""
        if not self._collect() and self._search.widen():
            self.domain = self._search.domain
            self._seen.clear()
            self._collect()
        self._pin()
        for _ in range(_MOST_REFINEMENTS if self._table.by_display else 0):
            found = self._fitted()
            chosen = self._chosen(found.wishes)
            if not chosen or not self._observe(Assignment(self.domain, len(self._seen), chosen=chosen)):
                return found
        return self._fitted()

    def _collect(self) -> bool:
        """Observe at all columns of the table, at narrower sizes where the widest are refused; were none?"""
        self._observe(Assignment(self.domain))
        refused = False
        for column in range(1, COLUMNS) if self._table.by_display else ():
            accepted = (i for i in range(RANGES) if self._observe(Assignment(self.domain, column, narrower=i)))
            refused |= next(accepted, None) != 0
        return not refused

    def _pin(self) -> None:
        """Vary each dimension that has not varied yet; one that the graph holds to its size is no variable."""
        for symbol in self._free():
            first = self._seen[0][0](symbol)
            if any(sizes(symbol) != first for sizes, _ in self._seen):
                continue
            step = self.domain.scales.get(symbol, (0, 1))[1]
            for size in (first + step, first + 2 * step, first - step):
                self._observe(Assignment(self.domain, chosen={symbol: size}))
            if all(sizes(symbol) == first for sizes, _ in self._seen):
                self.domain = self.domain.tied(symbol, sympy.Integer(first))

    def _free(self) -> list[sympy.Symbol]:
        return [s for s in self._table.by_display.values() if s not in self.domain.relations]

    def _evaluate(self, sizes: Assignment, hopeless: frozenset[fx.Node]) -> Observation:
        """Evaluate, or recall: the search for a domain has seen some of the sizes already."""
        key = f"{sizes.key} {len(hopeless)}"
        if key not in self._memo:
            self._memo[key] = self._evaluator.observe(sizes, hopeless)
        return self._memo[key]

    def _fitted(self) -> Expressions:
        columns = {s: [sizes(s) for sizes, _ in self._seen] for s in self._free()}
        return Expressions(self._graph, columns, [seen for _, seen in self._seen])

    def _observe(self, sizes: Assignment) -> bool:
        """Add an observation, unless the graph refuses these sizes or tells less about them than the first ones."""
        seen = self._evaluate(sizes, self._search.hopeless)
        if seen.suspect is not None or (self._seen and seen.unknown > self._seen[0][1].unknown):
            return False
        self._seen.append((sizes, seen))
        return True

    def _chosen(self, wishes: list[Wish]) -> dict[sympy.Symbol, int]:
        """Sizes at which one more observation would tell most, one per symbol."""
        chosen: dict[sympy.Symbol, int] = {}
        for wish in dict.fromkeys(wishes):
            symbol = next((s for s in sorted(wish.expression.free_symbols, key=str) if s not in chosen), None)
            if symbol is None:
                continue
            if wish.stride is None:
                chosen[symbol] = _FURTHER * max(sizes(symbol) for sizes, _ in self._seen)
                continue
            size = self._halving(wish, symbol)
            if size is not None:
                chosen[symbol] = size
        return chosen

    def _halving(self, wish: Wish, symbol: sympy.Symbol) -> int | None:
        """The smallest size of one dimension at which the wished-for observation can be made."""
        first = self._seen[0][0]
        others = {s: first(s) for s in wish.expression.free_symbols if s != symbol}
        value_at = sympy.lambdify(symbol, wish.expression.subs(others), "math")
        low, step = self.domain.scales.get(symbol, (0, 1))
        sizes = range(low + 2 * step, low + step * _SEARCHED_SIZES, step)
        return next((size for size in sizes if wish.halves(int(value_at(size)))), None)
