"""The cost of a graph as expressions in the model's own symbols."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.cost import memory
from graphopt.cost.display import format_expr, growth
from graphopt.cost.table import Call, Shape, lookup
from graphopt.dialect import operator_of
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.shapes import Shapes, shapes_of
from graphopt.shapes.observe import evaluate
from graphopt.subgraphs import node_proto

# The default size of a dimension: one sample, and a length that is typical of text.
_FIRST_AXIS, _OTHER_AXIS = 1, 128
_GET = "getitem"


@dataclass(frozen=True)
class Cost:
    """What one run of a graph takes; expressions are in the symbols of `shapes`.

    Nodes that cannot be counted are in `unknown` and contribute nothing.
    """

    parameters: int
    parameters_by_dtype: Mapping[str, int]
    weight_bytes: int
    flops: sympy.Expr
    matmul_flops: sympy.Expr
    """The part of `flops` in matrix products, convolutions, attention and recurrent layers."""
    peak_activation_bytes: sympy.Expr
    """At the moment that is the peak at `reference`; at other sizes another moment may be."""
    peak_node: str
    by_kind: Mapping[str, sympy.Expr]
    by_node: Mapping[str, sympy.Expr]
    unknown: Mapping[str, str]
    """Nodes without a FLOP count, and why."""
    reference: Mapping[sympy.Symbol, int]
    """The sizes at which orders and ratios are taken."""
    shapes: Shapes = field(repr=False)

    def at(self, sizes: Mapping[Any, int]) -> dict[str, int]:
        """Numbers for given sizes, by symbol or name.

        Raises:
            GraphOptError: a name is unknown, or a size that matters is missing.
        """
        known = self.shapes.resolve(sizes)
        return {name: self._number(name, expression, known) for name, expression in self.quantities().items()}

    def quantities(self) -> dict[str, sympy.Expr]:
        """The totals, by name."""
        return {
            "parameters": sympy.Integer(self.parameters),
            "weight_bytes": sympy.Integer(self.weight_bytes),
            "flops": self.flops,
            "matmul_flops": self.matmul_flops,
            "peak_activation_bytes": self.peak_activation_bytes,
        }

    def top(self, count: int = 10) -> list[tuple[str, sympy.Expr]]:
        """The nodes with most FLOPs at the reference sizes."""
        ranked = sorted(self.by_node.items(), key=lambda item: -float(item[1].subs(self.reference)))
        return ranked[:count]

    def growth(self) -> dict[str, dict[str, str]]:
        """How FLOPs and peak activations grow in each dimension: `{"flops": {"seq": "O(seq**2)"}, ...}`."""
        totals = {"flops": self.flops, "peak_activation_bytes": self.peak_activation_bytes}
        return {
            quantity: {s.name: growth(e, s) for s in sorted(e.free_symbols, key=str)} for quantity, e in totals.items()
        }

    def summary(self) -> dict[str, str]:
        """The totals as text for people."""
        return {name: format_expr(expression) for name, expression in self.quantities().items()}

    def _number(self, name: str, expression: sympy.Expr, known: Mapping[sympy.Symbol, int]) -> int:
        missing = sorted(str(s) for s in expression.free_symbols - known.keys())
        if missing:
            raise GraphOptError(f"expected sizes for all dimensions of {name}, but {', '.join(missing)} is missing")
        return evaluate(expression, known.__getitem__)


def cost_of(graph: Graph, reference: Mapping[Any, int] | None = None, *, shapes: Shapes | None = None) -> Cost:
    """Count parameters, bytes, FLOPs and peak activations; no node makes it fail.

    Args:
        graph: what to count.
        reference: sizes by symbol or name at which the peak is looked for; 1 for first axes and 128 for others.
        shapes: those of the graph, where they are known already.
    """
    shapes = shapes or shapes_of(graph)
    sizes = _reference(graph, shapes, reference or {})
    kinds = {node: kind_of(graph, node) for node in graph.nodes if node.op not in ("output", "placeholder", "get_attr")}
    by_node: dict[str, sympy.Expr] = {}
    unknown: dict[str, str] = {}
    totals: dict[str, Counter[sympy.Expr]] = {}
    contractions = set()
    for node, kind in kinds.items():
        if _is_shape_arithmetic(node, shapes):
            continue
        entry = lookup(kind)
        if entry is None:
            if not _free(node, shapes):
                unknown[node.name] = f"no FLOP count for {kind}"
            continue
        try:
            count = sympy.sympify(entry.count(_call(node, kind, shapes)))
        except Exception as error:  # a third party's count, or a shape that is not known
            unknown[node.name] = f"{kind}: {error}"
            continue
        by_node[node.name] = count
        totals.setdefault(kind, Counter())[count] += 1
        if entry.contraction:
            contractions.add(kind)
    by_kind = {kind: sympy.expand(sympy.Add(*(n * e for e, n in counts.items()))) for kind, counts in totals.items()}
    by_kind = {kind: e for kind, e in by_kind.items() if e != 0}
    own = memory.weights(graph)
    peak = memory.peak(graph, shapes, kinds, sizes)
    return Cost(
        parameters=sum(own.parameters.values()),
        parameters_by_dtype=own.parameters,
        weight_bytes=own.bytes,
        flops=sympy.expand(sympy.Add(*by_kind.values())),
        matmul_flops=sympy.expand(sympy.Add(*(e for kind, e in by_kind.items() if kind in contractions))),
        peak_activation_bytes=peak.bytes,
        peak_node=peak.node,
        by_kind=by_kind,
        by_node={name: e for name, e in by_node.items() if e != 0},
        unknown={**{name: "its size is unknown" for name in peak.unknown}, **unknown},
        reference=sizes,
        shapes=shapes,
    )


def kind_of(graph: Graph, node: fx.Node) -> str:
    """What a node is: the key of the FLOP table."""
    if node.op == "call_module":
        module = graph.module.get_submodule(str(node.target))
        proto = node_proto(module)
        return type(module).__qualname__ if proto is None else _onnx_kind(proto.domain, proto.op_type)
    target = node.target
    if target is operator.getitem:
        return _GET
    if node.op == "call_method":
        return f"aten::{target}"
    entry = operator_of(target) if callable(target) else None
    if entry is not None:
        return _onnx_kind(entry.domain, entry.name)
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    name = getattr(target, "__name__", str(target))
    # Functions of torch and of the operator module share their names with the ATen operators.
    owner = str(getattr(target, "__module__", None) or "").partition(".")[0]
    return f"aten::{name}" if owner in ("torch", "_operator") else name


def _onnx_kind(domain: str, name: str) -> str:
    return name if domain in ("", "ai.onnx") else f"{domain}::{name}"


def _free(node: fx.Node, shapes: Shapes) -> bool:
    """Selection of a result, and arithmetic on Python numbers."""
    if node.target is operator.getitem:
        return True
    values = shapes.outputs(node)
    return node not in shapes.unknown and all(v is not None and v.shape is None for v in values)


def _is_shape_arithmetic(node: fx.Node, shapes: Shapes) -> bool:
    """Whether the values themselves are known: such nodes run on a handful of integers, before the data is there."""
    return shapes.values(node) is not None


def _call(node: fx.Node, kind: str, shapes: Shapes) -> Call:
    target = node.target
    names: list[str] = []
    if isinstance(target, torch._ops.OpOverload):
        names = [argument.name for argument in target._schema.arguments]
    attrs = {name: value for name, value in zip(names, node.args, strict=False) if not isinstance(value, fx.Node)}
    inputs = [shapes.shape(a) if isinstance(a, fx.Node) else None for a in node.args]
    for name in names[len(inputs) :]:
        # A torch operator's tensors may be passed by keyword.
        value = node.kwargs.get(name)
        inputs.append(shapes.shape(value) if isinstance(value, fx.Node) else None)
    origin = node.meta.get("onnx")
    if node.op == "call_module" and origin is not None:
        attrs |= _attributes(origin.proto)
    outputs = tuple(None if v is None else v.shape for v in shapes.outputs(node))
    attrs |= {name: value for name, value in node.kwargs.items() if not isinstance(value, fx.Node)}
    return Call(kind, tuple(inputs), outputs, attrs, tuple(_operands(node, shapes)))


def _operands(node: fx.Node, shapes: Shapes) -> Iterator[Shape]:
    def flat(value: Any) -> Iterator[Shape]:
        if isinstance(value, fx.Node):
            shape = shapes.shape(value)
            if shape is not None:
                yield shape
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from flat(item)

    return flat(node.args)


def _attributes(proto: Any) -> dict[str, Any]:
    import onnx

    simple = (a for a in proto.attribute if a.type in (a.INT, a.INTS, a.FLOAT, a.FLOATS, a.STRING))
    values = {a.name: onnx.helper.get_attribute_value(a) for a in simple}
    return {name: v.decode(errors="replace") if isinstance(v, bytes) else v for name, v in values.items()}


def _reference(graph: Graph, shapes: Shapes, given: Mapping[Any, int]) -> dict[sympy.Symbol, int]:
    first = {s[0] for node in graph.placeholders if (s := shapes.shape(node))}
    sizes = shapes.resolve(given)
    for symbol in shapes.symbols.values():
        if symbol in sizes or symbol in shapes.relations:
            continue
        low, step = shapes.steps.get(symbol, (0, 1))
        size = _FIRST_AXIS if symbol in first else _OTHER_AXIS
        sizes[symbol] = -(-max(size, low) // step) * step
    return shapes.resolve(sizes)
