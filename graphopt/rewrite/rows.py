"""A replacement that needs only the last row of a mask [B, 1, T, S] should not make the runtime compute all of it.

narrow(f(a, b), -2, -1, 1)   ->   f(narrow(a, -2, -1, 1), narrow(b, -2, -1, 1))   for elementwise f
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.graph import Graph
from graphopt.rewrite.splice import erase_dead
from graphopt.shapes import Shapes, shapes_of
from graphopt.sites.vocabulary import kind

_ELEMENTWISE = {
    *("where", "and", "or", "not", "cast", "identity", "isnan", "masked_fill"),
    *("add", "sub", "mul", "div", "neg", "max", "min", "maximum", "minimum"),
    *("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"),
}
_LAST = (-2, -1, 1)


def compute_last_rows_only(graph: Graph) -> None:
    """Move every last-row narrow of the graph towards its inputs, in place; exact.

    A value whose row axis has size 1 is its own last row; an expanded value's last row is the value itself, because
    what reads it broadcasts.
    """
    narrows = [n for n in graph.nodes if n.target is torch.narrow and tuple(n.args[1:]) == _LAST]
    if not narrows:
        return
    shapes = shapes_of(graph)
    moved = _Rows(graph, shapes)
    for node in narrows:
        value: Any = node.args[0]
        row = moved.of(value)
        if row is None or row is value:
            continue
        node.args = (row, *_LAST)
        erase_dead(graph, [value])
    graph.module.recompile()


class _Rows:
    def __init__(self, graph: Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._made: dict[fx.Node, fx.Node | None] = {}

    def of(self, value: fx.Node) -> fx.Node | None:
        """A node with the last row of `value`; `value` itself where it has but one; None where that is not known."""
        if value not in self._made:
            self._made[value] = self._make(value)
        return self._made[value]

    def _make(self, value: fx.Node) -> fx.Node | None:
        shape = self._shapes.shape(value)
        if shape is None:
            return None
        if len(shape) < 2 or shape[-2] == 1:
            return value
        what = kind(value)
        if what == "expand" and isinstance(value.args[0], fx.Node):
            return self._expanded(value.args[0], len(shape))
        if what in _ELEMENTWISE:
            return self._elementwise(value)
        return self._narrowed(value, len(shape))

    def _expanded(self, inner: fx.Node, rank: int) -> fx.Node | None:
        shape = self._shapes.shape(inner)
        # The reader counts axes from the front too, so the rank has to stay.
        return self.of(inner) if shape is not None and len(shape) == rank else None

    def _elementwise(self, value: fx.Node) -> fx.Node | None:
        rows = {a: self.of(a) for a in value.all_input_nodes if a.op != "get_attr" or self._shapes.shape(a) != ()}
        if any(row is None for row in rows.values()):
            return None
        with self._graph.fx.inserting_after(value):
            twin = self._graph.fx.node_copy(value, lambda n: rows.get(n) or n)
        twin.meta = self._meta(value, len(self._shapes.shape(value) or ()))
        self._place(twin)
        return twin

    def _narrowed(self, value: fx.Node, rank: int) -> fx.Node:
        value.meta.update(self._meta(value, rank))
        with self._graph.fx.inserting_after(value):
            row = self._graph.fx.call_function(torch.narrow, (value, *_LAST))
        row.meta = self._meta(value, rank)
        return row

    def _place(self, node: fx.Node) -> None:
        """Behind all of its operands: those may be new nodes themselves."""
        order = {n: i for i, n in enumerate(self._graph.nodes)}
        last = max(node.all_input_nodes, key=order.__getitem__)
        if order[last] > order[node]:
            last.append(node)

    def _meta(self, value: fx.Node, rank: int) -> dict[str, Any]:
        return {"dtype": self._shapes.dtype(value), "rank": rank}
