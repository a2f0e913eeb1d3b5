"""One cheap evaluation of a graph: tensors on the meta device, shape arithmetic for real."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.dialect import operator_of
from graphopt.graph import Graph, ValueSpec
from graphopt.opaque import OpaqueOperator
from graphopt.shapes.fallback import Fallback, SizeOf
from graphopt.shapes.shortcuts import shortcut
from graphopt.shapes.symbols import SymbolTable
from graphopt.shapes.values import Leaf, Unknown, leaves, strings, tensors
from graphopt.subgraphs import SubgraphOperator

# A tensor of at most this many elements keeps its values, as it may be part of shape arithmetic.
SMALL = 1024
# Beyond this torch cannot count the bytes.
_MOST_ELEMENTS = 1 << 58
# Operators that make a large tensor from small ones: the size is looked at before they run for real.
_CREATORS = frozenset({"ConstantOfShape", "OneHot", "Tile", "Pad", "Resize", "Upsample", "CenterCropPad"})


@dataclass(frozen=True)
class Suspect:
    """A node that refused its operands: the assumed sizes may contradict each other there."""

    node: fx.Node
    position: int
    """Where in the order of execution it stands."""
    sizes: frozenset[int]
    """The sizes of its operands."""


@dataclass
class Observation:
    """What one evaluation saw: the leaves of each node's value, or why there are none."""

    leaves: dict[fx.Node, tuple[Leaf | Unknown, ...]] = field(default_factory=dict)
    suspect: Suspect | None = None
    """Where the evaluation ended early."""

    @property
    def unknown(self) -> int:
        """How many nodes have no shape."""
        return sum(any(isinstance(leaf, Unknown) for leaf in each) for each in self.leaves.values())


class Evaluator:
    """Evaluates one graph at many sizes; what depends on weights alone is computed once."""

    def __init__(self, graph: Graph, inputs: list[tuple[sympy.Expr, ...] | None], table: SymbolTable) -> None:
        self.graph = graph
        self._inputs = dict(zip(graph.placeholders, zip(graph.inputs, inputs, strict=True), strict=False))
        self._table = table
        self._fallback = Fallback(graph, table)
        self._fixed = _independent(graph)
        self._kept: dict[fx.Node, Any] = {}
        # The originals are kept as well: an id is unique only while its object lives.
        self._meta: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def observe(self, size_of: SizeOf, hopeless: frozenset[fx.Node] = frozenset()) -> Observation:
        """Evaluate with every symbol at the size that `size_of` says, up to the first node that refuses its operands.

        Args:
            size_of: asked for every symbol of the inputs, and for those of data-dependent sizes as they turn up.
            hopeless: nodes that refuse at all sizes, and that do not end the evaluation.
        """
        seen = Observation()
        env: dict[fx.Node, Any] = {}
        for position, node in enumerate(self.graph.nodes):
            if node.op == "output":
                continue
            if node in self._kept:
                env[node] = self._kept[node]
            elif node.op == "placeholder":
                env[node] = self._input(node, size_of)
            elif node.op == "get_attr":
                env[node] = self._kept[node] = self._weight(node)
            else:
                value = self._run(node, env, size_of, node in hopeless)
                if isinstance(value, frozenset):
                    seen.suspect = Suspect(node, position, value)
                    break
                env[node] = value
            seen.leaves[node] = leaves(env[node])
        return seen

    def _input(self, node: fx.Node, size_of: SizeOf) -> Any:
        spec, shape = self._inputs.get(node, (ValueSpec(node.name, None, None), None))
        if shape is None:
            return self._input_value(node, spec, size_of)
        sizes = tuple(evaluate(dim, size_of) for dim in shape)
        if math.prod(sizes) > _MOST_ELEMENTS:
            return Unknown(f"input {spec} is too large")
        if isinstance(spec.dtype, torch.dtype):
            return torch.empty(sizes, dtype=spec.dtype, device="meta")
        return strings(sizes) if spec.dtype == "string" else Unknown(f"input {spec} has no torch type")

    def _input_value(self, node: fx.Node, spec: ValueSpec, size_of: SizeOf) -> Any:
        """An input that is no tensor: an integer is a symbol like a size, anything else keeps its example value."""
        value = node.meta.get("val", node)
        if isinstance(value, torch.SymInt):
            return size_of(self._table.get(spec.name))
        kept = value is None or isinstance(value, (int, float, bool, str))
        return value if kept else Unknown(f"input {spec.name!r} declares no shape")

    def _weight(self, node: fx.Node) -> Any:
        value = self.graph.weight(node)
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach() if value.numel() <= SMALL else self._to_meta(value)

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return value
        if id(value) not in self._meta:
            self._meta[id(value)] = (value, value.detach().to("meta"))
        return self._meta[id(value)][1]

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], size_of: SizeOf, hopeless: bool) -> Any:
        """The node's value, or the sizes of operands that do not fit each other."""
        for source in node.all_input_nodes:
            if isinstance(env[source], Unknown):
                return self._fallback.value(node, None, {}, f"its input {source.name} is unknown", size_of)
        whole = env[node.all_input_nodes[0]] if node.target is operator.getitem else None
        if isinstance(whole, tuple):
            # A node may have thousands of outputs: looking at all of them for each would be quadratic.
            index = int(node.args[1])  # type: ignore[arg-type]  # of an output
            return whole[index] if index < len(whole) else Unknown("its node gives fewer values than it declares")
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        try:
            value = pytree.tree_map(_shrunk, self._call(node, args, kwargs))
        except Exception as error:  # whatever a torch function raises: the reason decides what happens next
            if not hopeless and not _wants_values(node, args, error):
                return frozenset(size for x in tensors((args, kwargs)) for size in x.shape)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return pytree.tree_map(_shrunk, self._fallback.value(node, args, kwargs, reason, size_of))
        if node in self._fixed:
            self._kept[node] = value
        return value

    def _call(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._call_module(node, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        entry = operator_of(function)
        mixed = any(x.is_meta for x in tensors((args, kwargs)))
        if entry is None:
            return self._call_torch(function, args, kwargs, mixed)
        if mixed:
            args = tuple(a if i in entry.values else self._all_meta(a) for i, a in enumerate(args))
            quick = shortcut(entry)
            value = NotImplemented if quick is None else quick(args, kwargs)
            if value is not NotImplemented:
                return value
        elif entry.name == "Range":
            start, limit, delta = (float(x) for x in args)
            if abs(limit - start) > SMALL * abs(delta):
                return torch.empty(math.ceil((limit - start) / delta), dtype=args[0].dtype, device="meta")
        elif entry.name in _CREATORS:
            with torch.device("meta"):
                value = function(*args, **kwargs)
            if value.numel() > SMALL:
                return self._to_meta(value)
        return function(*args, **kwargs)

    def _call_torch(self, function: Any, args: Any, kwargs: dict[str, Any], mixed: bool) -> Any:
        """Call an ATen operator or any other function; what it creates is on the meta device too."""
        writes = isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable
        if mixed or writes:
            # What writes into its argument must not write into a weight.
            args, kwargs = self._all_meta((args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if function is torch.ops.aten.view.default:
            # Layouts on the meta device may differ from those of the real kernels; the sizes do not.
            function = torch.ops.aten.reshape.default
        return function(*args, **kwargs)

    def _call_module(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        module = self.graph.module.get_submodule(str(node.target))
        if isinstance(module, OpaqueOperator):
            raise NotImplementedError(f"{module.extra_repr()} has no torch function")
        if isinstance(module, SubgraphOperator):
            # Where a body mixes these operands with weights, or asks for values, it is tried on real ones instead.
            raise NotImplementedError(f"{module.extra_repr()} runs its bodies on values")
        state = {name: self._to_meta(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
        args, kwargs = self._all_meta((args, kwargs))
        return torch.func.functional_call(module, state, args, kwargs)

    def _all_meta(self, value: Any) -> Any:
        if isinstance(value, (tuple, list, dict)):
            return pytree.tree_map(self._to_meta, value)
        return self._to_meta(value)


def evaluate(expression: sympy.Expr, size_of: SizeOf) -> int:
    """The expression at the sizes of its symbols."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return size_of(expression)
    return int(expression.subs({symbol: size_of(symbol) for symbol in expression.free_symbols}))


def _shrunk(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and value.numel() > SMALL else value


def _wants_values(node: fx.Node, args: Any, error: Exception) -> bool:
    """Whether the node failed for lack of values, as opposed to sizes that do not fit each other."""
    if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
        return True
    entry = operator_of(node.target) if callable(node.target) else None
    return entry is not None and any(
        i < len(args) and isinstance(args[i], torch.Tensor) and args[i].is_meta for i in entry.values
    )


def _independent(graph: Graph) -> frozenset[fx.Node]:
    """The nodes that no input reaches."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op != "placeholder" and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return frozenset(fixed)
