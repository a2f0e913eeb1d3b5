"""One cheap evaluation of a graph: tensors on the meta device, shape arithmetic for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.dialect import operator_of
from graphopt.graph import Dim, Graph
from graphopt.opaque import OpaqueOperator
from graphopt.shapes.declared import Declared, DeclaredValue
from graphopt.shapes.symbols import SymbolTable
from graphopt.shapes.trial import trials

# A tensor of at most this many elements keeps its values, as it may be part of shape arithmetic.
SMALL = 1024
# Operators that make a large tensor from small ones: their size is looked at before they run for real.
_CREATORS = frozenset({"ConstantOfShape", "Range", "OneHot", "Tile", "Pad", "Resize", "Upsample", "CenterCropPad"})

SizeOf = Callable[[sympy.Symbol], int]


@dataclass(frozen=True)
class Unknown:
    """The value of a node whose shape cannot be told, and why."""

    reason: str


@dataclass(frozen=True)
class Leaf:
    """One observed tensor (or Python integer: then `shape` is None)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | str
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Suspect:
    """A node that refused its operands: the assumed sizes may contradict each other there."""

    node: fx.Node
    position: int
    sizes: frozenset[int]


@dataclass
class Observation:
    """What one evaluation saw: the leaves of each node's value, or why there are none."""

    leaves: dict[fx.Node, list[Leaf] | Unknown] = field(default_factory=dict)
    suspects: list[Suspect] = field(default_factory=list)


class Evaluator:
    """Evaluates one graph at many sizes; what depends on weights alone is computed once."""

    def __init__(self, graph: Graph, inputs: list[tuple[sympy.Expr, ...] | None], table: SymbolTable) -> None:
        self.graph = graph
        self._inputs = inputs
        self._table = table
        self._declared = Declared(graph)
        self._kept: dict[fx.Node, Any] = {}
        self._fixed = _independent(graph)
        self._meta: dict[int, tuple[Any, torch.Tensor]] = {}
        self._trials: dict[Any, list[Any]] = {}
        self._fresh: dict[tuple[str, int, int], sympy.Symbol] = {}

    @torch.no_grad()
    def observe(self, size_of: SizeOf, accepted: frozenset[fx.Node] | None = None) -> Observation:
        """Evaluate with every symbol at the size that `size_of` says.

        Args:
            size_of: asked for every symbol of the inputs, and for those of data-dependent sizes as they turn up.
            accepted: when given, stop at the first suspect outside of it.
        """
        seen = Observation()
        env: dict[fx.Node, Any] = {}
        placeholders = iter(zip(self.graph.inputs, self._inputs, strict=True))
        for position, node in enumerate(self.graph.nodes):
            if node.op == "output":
                continue
            if node in self._kept:
                env[node] = self._kept[node]
            elif node.op == "placeholder":
                spec, shape = next(placeholders)
                env[node] = _input(node, spec.dtype, shape, size_of)
            elif node.op == "get_attr":
                env[node] = self._kept[node] = self._weight(node)
            else:
                env[node] = self._run(node, position, env, size_of, seen)
            seen.leaves[node] = _leaves(env[node])
            if accepted is not None and seen.suspects and seen.suspects[-1].node not in accepted:
                break
        return seen

    def _weight(self, node: fx.Node) -> Any:
        value = self.graph.weight(node)
        if isinstance(value, torch.Tensor):
            return value.detach() if value.numel() <= SMALL and not value.is_meta else self._to_meta(value)
        return value

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return value
        if id(value) not in self._meta:
            # The original is kept as well: an id is unique only while its object lives.
            self._meta[id(value)] = (value, value.detach().to("meta"))
        return self._meta[id(value)][1]

    def _run(self, node: fx.Node, position: int, env: dict[fx.Node, Any], size_of: SizeOf, seen: Observation) -> Any:
        for source in node.all_input_nodes:
            if isinstance(env[source], Unknown):
                return self._fallback(node, None, {}, f"its input {source.name} is unknown", size_of)
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        try:
            value = self._call(node, args, kwargs)
        except Exception as error:  # whatever a torch function raises: the reason decides what happens next
            if not _wants_values(node, args, error):
                sizes = frozenset(s for x in _tensors((args, kwargs)) for s in x.shape)
                seen.suspects.append(Suspect(node, position, sizes))
            return self._fallback(node, args, kwargs, _first_line(error), size_of)
        if node in self._fixed:
            self._kept[node] = value
        return value

    def _call(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._call_module(node, args, kwargs)
        if node.op == "call_method":
            owner, *rest = args
            return getattr(owner, str(node.target))(*rest, **kwargs)
        function: Any = node.target
        entry = operator_of(function)
        mixed = any(x.is_meta for x in _tensors((args, kwargs)))
        if entry is None:
            return self._call_torch(function, args, kwargs, mixed)
        if mixed:
            args = tuple(
                a if i in entry.values else pytree.tree_map(self._to_meta, a) if isinstance(a, (list, tuple))
                else self._to_meta(a)
                for i, a in enumerate(args)
            )  # fmt: skip
        elif entry.name in _CREATORS:
            with torch.device("meta"):
                value = function(*args, **kwargs)
            if value.numel() > SMALL:
                return self._to_meta(value)
        return pytree.tree_map(self._shrink, function(*args, **kwargs))

    def _call_torch(self, function: Any, args: Any, kwargs: dict[str, Any], mixed: bool) -> Any:
        """Call an ATen operator or any other function; what it creates is on the meta device too."""
        writes = isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable
        if mixed or writes:
            # An operator that writes into its argument must not write into a weight.
            args, kwargs = pytree.tree_map(self._to_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if function is torch.ops.aten.view.default:
            # Layouts on the meta device may differ from those of the real kernels; the sizes do not.
            function = torch.ops.aten.reshape.default
        return pytree.tree_map(self._shrink, function(*args, **kwargs))

    def _call_module(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        module = self.graph.module.get_submodule(str(node.target))
        if isinstance(module, OpaqueOperator):
            raise NotImplementedError(f"{module.extra_repr()} runs on onnxruntime")
        state = {name: self._to_meta(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
        args, kwargs = pytree.tree_map(self._to_meta, (args, kwargs))
        return torch.func.functional_call(module, state, args, kwargs)

    def _shrink(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.numel() > SMALL:
            return value.to("meta")
        return value

    def _fallback(
        self, node: fx.Node, args: tuple[Any, ...] | None, kwargs: dict[str, Any], reason: str, size_of: SizeOf
    ) -> Any:
        """The node's value from its declared shapes, else from a trial on made-up values, else unknown."""
        if node.target is torch.ops.aten._local_scalar_dense.default or node.target is torch.ops.aten.item.default:
            return size_of(self._symbol((node.name, 0, 0)))
        declared = self._declared.values(node)
        dims = [None if d is None else self._resolve(d, size_of) for d in declared or ()]
        if dims and all(d is not None and None not in d for d in dims):
            results: list[Any] = []
        else:
            results = [] if args is None else self._trial(node, args, kwargs)
        if results and node not in self._fresh_nodes and not _tensors_are_unknown((args, kwargs)):
            return pytree.tree_map(self._shrink, results[0])
        count = len(dims) or (len(results[0]) if results and isinstance(results[0], (list, tuple)) else 1)
        single = not _has_many_outputs(node, results)
        made = [
            self._merge(node, i, declared[i] if declared else None, dims[i] if dims else None, results, single, reason, size_of)
            for i in range(count)
        ]  # fmt: skip
        return made[0] if single else tuple(made)

    _fresh_nodes: frozenset[fx.Node] = frozenset()

    def _resolve(self, value: DeclaredValue, size_of: SizeOf) -> list[int | None]:
        def size(dim: Dim) -> int | None:
            if not isinstance(dim, str):
                return dim
            known = self._table.by_display.get(dim)
            return None if known is None else size_of(known)

        return [size(dim) for dim in value.shape]

    def _trial(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        key = (node, tuple(_signature(x) for x in pytree.tree_leaves((args, kwargs))))
        if key not in self._trials:
            self._trials[key] = trials(self.graph, node, args, kwargs)
        return self._trials[key]

    def _merge(
        self,
        node: fx.Node,
        index: int,
        declared: DeclaredValue | None,
        dims: list[int | None] | None,
        results: list[Any],
        single: bool,
        reason: str,
        size_of: SizeOf,
    ) -> Any:
        tried = [r if single else r[index] for r in results]
        shapes = [tuple(t.shape) for t in tried if isinstance(t, (torch.Tensor, np.ndarray))]
        if len(shapes) != len(tried):
            return Unknown(f"{reason}; its value is no tensor")
        ranks = {len(s) for s in shapes}
        if dims is None and len(ranks) == 1:
            dims = [None] * ranks.pop()
        if dims is None:
            return Unknown(reason)
        for axis, dim in enumerate(dims):
            if dim is not None:
                continue
            sizes = {s[axis] for s in shapes if len(s) == len(dims)}
            dims[axis] = sizes.pop() if len(sizes) == 1 else size_of(self._symbol((node.name, index, axis)))
        if declared is not None and declared.dtype == "string" or (tried and isinstance(tried[0], np.ndarray)):
            return _strings(dims)
        dtype = declared.dtype if declared is not None else tried[0].dtype
        return torch.empty([int(d or 0) for d in dims], dtype=dtype, device="meta")

    def _symbol(self, key: tuple[str, int, int]) -> sympy.Symbol:
        if key not in self._fresh:
            self._fresh[key] = self._table.fresh()
        return self._fresh[key]
