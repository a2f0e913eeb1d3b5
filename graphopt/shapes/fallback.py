"""Shapes of nodes that need values where only shapes are known: declared ones, then trials, then a fresh symbol."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.graph import Graph
from graphopt.shapes.declared import Declared, DeclaredValue
from graphopt.shapes.symbols import SymbolTable, is_name
from graphopt.shapes.trial import trials
from graphopt.shapes.values import Unknown, is_made_up, strings

# Beyond this torch cannot count the bytes.
_MOST_ELEMENTS = 1 << 58
SizeOf = Callable[[sympy.Symbol], int]

_AS_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class Fallback:
    """Answers for the nodes of one graph; the same size gets the same symbol in every evaluation."""

    def __init__(self, graph: Graph, table: SymbolTable) -> None:
        self._graph = graph
        self._table = table
        self._declared = Declared(graph)
        self._results: dict[Any, list[Any]] = {}
        self._fresh: dict[tuple[str, int, int], sympy.Symbol] = {}

    def value(
        self,
        node: fx.Node,
        args: tuple[Any, ...] | None,
        kwargs: dict[str, Any],
        reason: str,
        size_of: SizeOf,
    ) -> Any:
        """A value of the node's shape, `Unknown` (or a tuple that holds it) where that cannot be told.

        Args:
            node: what could not be evaluated.
            args: its operands, None when one of them is unknown.
            kwargs: its keyword operands.
            reason: why it could not be evaluated.
            size_of: the size of a symbol in this evaluation.
        """
        if node.target in _AS_NUMBER:
            return size_of(self._symbol(node, 0, 0))
        declared = self._declared.values(node)
        complete = declared is not None and all(d is not None and self._closed(d) for d in declared)
        results = [] if complete or args is None else self._tried(node, args, kwargs)
        if results and not any(is_made_up(x) for x in pytree.tree_leaves((args, kwargs))):
            return results[0]
        if declared is None and not results:
            return Unknown(reason)
        many = _has_many(node, results)
        if not many:
            return self._merged(node, 0, declared[0] if declared else None, results, reason, size_of)
        count = len(declared) if declared is not None else len(results[0])
        if any(not isinstance(r, (list, tuple)) or len(r) < count for r in results):
            return Unknown(f"{reason}; it gives fewer values than it declares")
        return tuple(
            self._merged(node, i, declared[i] if declared else None, [r[i] for r in results], reason, size_of)
            for i in range(count)
        )

    def _closed(self, value: DeclaredValue) -> bool:
        return all(isinstance(d, int) or d in self._table.by_display for d in value.shape)

    def _tried(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        key = (node, tuple(_signature(x) for x in pytree.tree_leaves((args, kwargs))))
        if key not in self._results:
            self._results[key] = trials(self._graph, node, args, kwargs)
        return self._results[key]

    def _merged(
        self,
        node: fx.Node,
        index: int,
        declared: DeclaredValue | None,
        tried: list[Any],
        reason: str,
        size_of: SizeOf,
    ) -> Any:
        """One output: each size as declared, else as all trials have it, else a symbol."""
        shapes = [tuple(x.shape) for x in tried if hasattr(x, "shape")]
        ranks = {len(shape) for shape in shapes}
        if declared is None and (len(ranks) != 1 or len(shapes) != len(tried)):
            return Unknown(f"{reason}; its value is no tensor of one rank")
        rank = len(declared.shape) if declared is not None else ranks.pop()
        fitting = [shape for shape in shapes if len(shape) == rank]
        sizes: list[int] = []
        for axis in range(rank):
            dim = declared.shape[axis] if declared is not None else None
            agreed = {shape[axis] for shape in fitting}
            if isinstance(dim, str) and dim in self._table.by_display:
                dim = size_of(self._table.by_display[dim])
            if not isinstance(dim, int):
                # One trial alone cannot show that a size does not depend on the values.
                certain = len(agreed) == 1 and len(fitting) > 1
                dim = agreed.pop() if certain else size_of(self._symbol(node, index, axis, dim))
            sizes.append(dim)
        if math.prod(sizes) > _MOST_ELEMENTS:
            return Unknown(f"{reason}; it is too large")
        dtype = declared.dtype if declared is not None else getattr(tried[0], "dtype", None)
        if not isinstance(dtype, torch.dtype):
            return strings(tuple(sizes))
        return torch.empty(sizes, dtype=dtype, device="meta")

    def _symbol(self, node: fx.Node, index: int, axis: int, name: str | None = None) -> sympy.Symbol:
        key = (node.name, index, axis)
        if key not in self._fresh:
            # `unk__` is what ONNX's shape inference makes up.
            named = name is not None and is_name(name) and not name.startswith("unk__")
            self._fresh[key] = self._table.get(name) if name is not None and named else self._table.fresh()
        return self._fresh[key]


def _has_many(node: fx.Node, results: list[Any]) -> bool:
    origin = node.meta.get("onnx")
    if origin is not None:
        return len(origin.proto.output) != 1
    if results:
        return isinstance(results[0], tuple)
    return isinstance(node.meta.get("val"), (tuple, list))


def _signature(value: Any) -> Any:
    """What of an operand decides a trial's outcome: the shape, or the value where it is known."""
    if is_made_up(value):
        return ("shape", tuple(value.shape), str(value.dtype))
    if isinstance(value, torch.Tensor):
        return ("value", tuple(value.shape), str(value.dtype), value.reshape(-1)[:64].tolist().__repr__())
    return repr(value)
