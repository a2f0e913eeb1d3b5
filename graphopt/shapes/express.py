"""From observations to expressions, node by node in the order of execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from graphopt.graph import Graph
from graphopt.shapes.fit import Fitter, Term, Vector, Wish
from graphopt.shapes.observe import Observation
from graphopt.shapes.symbols import SymbolTable
from graphopt.shapes.values import Leaf, Unknown


@dataclass(frozen=True)
class SymbolicValue:
    """One tensor (or Python integer: then `shape` is None) in symbols."""

    shape: tuple[sympy.Expr, ...] | None
    dtype: torch.dtype | str
    values: tuple[sympy.Expr, ...] | None = None
    """The elements of a small integer tensor that is part of shape arithmetic."""


class Expressions:
    """Expressions for everything that was observed; a size without one is a dummy until the end."""

    def __init__(
        self, graph: Graph, columns: Mapping[sympy.Symbol, Sequence[int]], seen: Sequence[Observation]
    ) -> None:
        self._fitter = Fitter(columns, len(seen))
        self._terms: dict[fx.Node, list[Term]] = {}
        self._values: dict[fx.Node, tuple[SymbolicValue | None, ...]] = {}
        self._unknown: dict[fx.Node, str] = {}
        self._dummies: list[sympy.Symbol] = []
        for node in graph.nodes:
            if node.op != "output":
                self._values[node] = self._node(node, [s.leaves[node] for s in seen])

    @property
    def wishes(self) -> list[Wish]:
        """Which further observations would help."""
        return self._fitter.wishes

    def finished(
        self, table: SymbolTable
    ) -> tuple[dict[fx.Node, tuple[SymbolicValue | None, ...]], dict[fx.Node, str]]:
        """The values, dummies replaced by fresh symbols of the table, and the reasons for unknown ones."""
        if not self._dummies:
            return self._values, self._unknown
        names = {dummy: table.fresh() for dummy in self._dummies}

        def named(dims: tuple[sympy.Expr, ...] | None) -> tuple[sympy.Expr, ...] | None:
            return None if dims is None else tuple(dim.xreplace(names) for dim in dims)

        values = {
            node: tuple(v and SymbolicValue(named(v.shape), v.dtype, named(v.values)) for v in outputs)
            for node, outputs in self._values.items()
        }
        return values, self._unknown

    def _node(self, node: fx.Node, seen: list[tuple[Leaf | Unknown, ...]]) -> tuple[SymbolicValue | None, ...]:
        near = [term for source in node.all_input_nodes for term in self._terms[source]]
        self._terms[node] = []
        if len({len(leaves) for leaves in seen}) != 1:
            self._unknown[node] = "how many tensors it returns depends on the sizes"
            return ()
        return tuple(self._output(node, list(each), near) for each in zip(*seen, strict=True))

    def _output(self, node: fx.Node, seen: list[Leaf | Unknown], near: list[Term]) -> SymbolicValue | None:
        leaves = [leaf for leaf in seen if isinstance(leaf, Leaf)]
        if len(leaves) != len(seen):
            self._unknown[node] = next(leaf.reason for leaf in seen if isinstance(leaf, Unknown))
            return None
        shapes = [leaf.shape for leaf in leaves if leaf.shape is not None]
        if len({len(shape) for shape in shapes}) > 1:
            self._unknown[node] = "its rank depends on the sizes"
            return None
        shape = tuple(self._fit(node, v, near) for v in zip(*shapes, strict=True)) if shapes else None
        elements = [leaf.values for leaf in leaves if leaf.values is not None]
        values = None
        if len(elements) == len(leaves) and len({len(e) for e in elements}) == 1:
            values = tuple(self._fit(node, v, near) for v in zip(*elements, strict=True))
        return SymbolicValue(shape, leaves[0].dtype, values)

    def _fit(self, node: fx.Node, vector: Vector, near: list[Term]) -> sympy.Expr:
        term = self._fitter.fit(vector, near)
        if term is None:
            dummy = sympy.Dummy("d", integer=True, positive=True)
            self._dummies.append(dummy)
            term = Term(dummy, vector)
            self._fitter.remember(term)
        self._terms[node].append(term)
        return term.expression
