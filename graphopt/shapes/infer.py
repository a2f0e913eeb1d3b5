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
from graphopt.shapes.assign import ROUNDS, Assignment, Domain, settle
from graphopt.shapes.express import Expressions, SymbolicValue
from graphopt.shapes.fit import Wish
from graphopt.shapes.observe import Evaluator, Observation, evaluate
from graphopt.shapes.symbols import SymbolTable, input_shapes

# Each further observation halves the doubt about where a strided layer starts to round.
_MOST_REFINEMENTS = 10
_SEARCHED_SIZES = 260


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
    """Smallest observed size and step of a dimension that the graph does not accept at any small size."""
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
    domain, _ = settle(evaluator.observe, lambda: list(table.by_display.values()))
    values, unknown = _Run(graph, evaluator, table, domain).expressions().finished(table)
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
        steps=domain.scales,
        open=frozenset(table.by_display.values()) - named,
        _values=values,
    )


class _Run:
    """The observations of one graph."""

    def __init__(self, graph: Graph, evaluator: Evaluator, table: SymbolTable, domain: Domain) -> None:
        self._graph = graph
        self._evaluator = evaluator
        self._table = table
        self._domain = domain
        self._seen: list[tuple[Assignment, Observation]] = []

    def expressions(self) -> Expressions:
        """Observe until the expressions are settled."""
        self._observe(Assignment(self._domain))
        if self._table.by_display:
            for row in range(1, ROUNDS):
                self._observe(Assignment(self._domain, row)) or self._observe(Assignment(self._domain, row, near=True))
        for _ in range(_MOST_REFINEMENTS):
            found = self._fitted()
            chosen = self._chosen(found.wishes)
            if not chosen or not self._observe(Assignment(self._domain, len(self._seen), chosen=chosen)):
                return found
        return self._fitted()

    def _fitted(self) -> Expressions:
        free = [s for s in self._table.by_display.values() if s not in self._domain.relations]
        columns = {s: [sizes(s) for sizes, _ in self._seen] for s in free}
        return Expressions(self._graph, columns, [seen for _, seen in self._seen])

    def _observe(self, sizes: Assignment) -> bool:
        """Add an observation, unless more nodes refuse these sizes than the first ones."""
        seen = self._evaluator.observe(sizes)
        if self._seen and len(seen.suspects) > len(self._seen[0][1].suspects):
            return False
        self._seen.append((sizes, seen))
        return True

    def _chosen(self, wishes: list[Wish]) -> dict[sympy.Symbol, int]:
        """Sizes at which one more observation would tell most, one per symbol."""
        chosen: dict[sympy.Symbol, int] = {}
        first = self._seen[0][0]
        for wish in wishes:
            symbol = next((s for s in sorted(wish.expression.free_symbols, key=str) if s not in chosen), None)
            if symbol is None:
                continue
            low, step = self._domain.scales.get(symbol, (0, 1))
            for size in range(low + 2 * step, low + step * _SEARCHED_SIZES, step):
                value = evaluate(wish.expression, {**self._sizes(wish, first), symbol: size}.__getitem__)
                if wish.value_at_middle(value):
                    chosen[symbol] = size
                    break
        return chosen

    @staticmethod
    def _sizes(wish: Wish, assignment: Assignment) -> dict[sympy.Symbol, int]:
        return {symbol: assignment(symbol) for symbol in wish.expression.free_symbols}
