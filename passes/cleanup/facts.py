"""What is known of each value before anything runs: type, shape, elements of shape arithmetic, constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.dialect import Operator, operator_of
from graphopt.graph import Graph, attribute
from graphopt.onnxfile.read import graphs
from graphopt.onnxfile.scopes import stored, trained
from graphopt.onnxfile.tensors import TORCH_DTYPES

from .dims import Dim, Shape, plain, static, symbol
from .elements import MOST, SIZES, Elements, elements_of
from .folding import Folder
from .inference import shape_of, split_shapes
from .operators import operation
from .types import element_type

# The torch function knows more than the table about these, if all sizes are static.
_ASK_FUNCTION = frozenset({"Conv", "MaxPool", "AveragePool", "Resize", "Range"})
# Before IR version 4 initialisers had to be listed as inputs, and could not be overridden.
_IR_OF_DEFAULTS = 4


@dataclass(frozen=True, eq=False)
class Fact:
    """Knowledge about one value; None means that nothing is known."""

    dtype: torch.dtype | None = None
    shape: Shape | None = None
    elements: Elements | None = None
    """Of integer and boolean tensors with few elements."""
    value: torch.Tensor | None = None
    """Where it is the same for all inputs."""
    parts: tuple[Fact, ...] = ()
    """Of a node with several outputs."""


UNKNOWN = Fact()


def constant(value: torch.Tensor) -> Fact:
    """All there is to know about a constant."""
    few = value.dtype in (*SIZES, torch.bool) and value.numel() <= MOST
    elements = tuple(value.reshape(-1).tolist()) if few else None
    return Fact(value.dtype, tuple(value.shape), elements, value)


class View:
    """A call of an ONNX operator and the facts about its operands."""

    def __init__(self, facts: Facts, node: fx.Node, entry: Operator) -> None:
        self.node = node
        self.name = entry.name
        self.since = entry.since
        self._facts = facts
        self.arguments: Sequence[Fact] = [facts[a] if isinstance(a, fx.Node) else UNKNOWN for a in node.args]

    def has(self, index: int) -> bool:
        """Whether the operand is given."""
        return index < len(self.node.args) and self.node.args[index] is not None

    def argument(self, index: int) -> Fact:
        """The facts about an operand."""
        return self.arguments[index] if index < len(self.arguments) else UNKNOWN

    def shape(self, index: int) -> Shape | None:
        """An operand's shape."""
        return self.argument(index).shape

    def elements(self, index: int) -> Elements | None:
        """An operand's elements, symbolic ones included."""
        return self.argument(index).elements

    def integers(self, index: int) -> tuple[int, ...] | None:
        """A constant operand's elements."""
        value = self.argument(index).value
        if value is None or value.is_floating_point() or value.dtype == torch.bool or value.numel() > MOST:
            return None
        return tuple(value.reshape(-1).tolist())

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute, or its default."""
        return self.node.kwargs.get(name, default)

    def tensor_attribute(self, name: str) -> torch.Tensor | None:
        """The value of a tensor attribute."""
        given = self.node.kwargs.get(name)
        return self._facts.graph.weight(given) if isinstance(given, fx.Node) else None

    def atom(self, axis: int) -> Dim:
        """The symbol for an axis of the node's value about which nothing else is known."""
        return symbol(f"{self.node.name}#{axis}")


class Facts:
    """The facts about the nodes of one graph; a node's operands are to be learnt before the node."""

    def __init__(self, graph: Graph, folder: Folder) -> None:
        self.graph = graph
        self.folder = folder
        self._known: dict[fx.Node, Fact] = {}
        self._specs = dict(zip(graph.placeholders, graph.inputs, strict=True))
        self.overridable = _overridable(graph)
        """ONNX names of weights that are no constants: defaults of graph inputs, and what the model's training sets."""
        self._packed = _packed(graph)
        source: Any = graph.source
        self._transient: frozenset[str] = getattr(source, "transient", frozenset())

    def __getitem__(self, node: fx.Node) -> Fact:
        return self._known.get(node, UNKNOWN)

    def learn(self, node: fx.Node) -> Fact:
        """Infer the facts about a node."""
        if node not in self._known:
            self._known[node] = self._infer(node)
        return self._known[node]

    def _infer(self, node: fx.Node) -> Fact:
        if node.op == "get_attr":
            return self._weight(node)
        if node.op == "placeholder" and self.graph.onnx is not None:
            spec = self._specs[node]
            dtype = spec.dtype if isinstance(spec.dtype, torch.dtype) else None
            # A name that two inputs share need not be one size: no runtime checks that.
            # The sizes that a body declares are checked by nobody, and a state may change its size from trip to trip.
            if spec.shape is None:
                return Fact(dtype, None)
            sizes = (d if self.graph.body is None and isinstance(d, int) and d >= 0 else None for d in spec.shape)
            return Fact(dtype, tuple(symbol(f"{node.name}#{i}") if d is None else d for i, d in enumerate(sizes)))
        if operation(node) == "getitem":
            whole, index = node.args
            parts = self[whole].parts if isinstance(whole, fx.Node) else ()
            if isinstance(index, int) and 0 <= index < len(parts):
                return parts[index]
        entry = operator_of(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]  # callable
        if entry is not None:
            return self._call(node, entry)
        declared = _declared(node)
        value = self.folder.aten(node, self, declared)
        return declared if value is None else constant(value)

    def _weight(self, node: fx.Node) -> Fact:
        value = attribute(self.graph.module, str(node.target))
        name = node.meta.get("onnx_name")
        if not isinstance(value, torch.Tensor) or name in self._packed or name in self.overridable:
            return UNKNOWN
        if _is_packed(node.meta.get("onnx_brought")):
            return UNKNOWN
        # A module's parameters and buffers may be trained or loaded anew: only what torch.export lifted stays.
        if self.graph.onnx is None and str(node.target) not in self._transient and not _ours(node):
            return Fact(value.dtype, tuple(value.shape))
        return constant(value.detach())

    def _call(self, node: fx.Node, entry: Operator) -> Fact:
        view = View(self, node, entry)
        fact = Fact()
        if entry.domain == "":
            try:
                fact = Fact(element_type(view), shape_of(view), elements_of(view))
            except (ArithmeticError, LookupError, TypeError, ValueError):  # attributes that make no sense
                return UNKNOWN
        outputs = node.kwargs.get("outputs", 1)
        if isinstance(outputs, int) and outputs > 1:
            return self._several(view, entry, fact, outputs)
        if fact.shape is None or fact.dtype is None or entry.name in _ASK_FUNCTION:
            asked = self._ask_function(view, entry)
            fact = replace(fact, dtype=asked.dtype or fact.dtype, shape=asked.shape or fact.shape)
        if entry.name == "Shape" and fact.elements is not None:
            fact = replace(fact, shape=(len(fact.elements),))
        return self._evaluate(view, fact)

    def _evaluate(self, view: View, fact: Fact) -> Fact:
        value = self.folder.evaluate(view, fact)
        if value is None and _spelt(fact):
            value = torch.tensor(fact.elements, dtype=fact.dtype).reshape(fact.shape or ())
        if value is not None:
            return constant(value)
        return fact if fact.shape is not None and fact.dtype is not None else replace(fact, elements=None)

    def _several(self, view: View, entry: Operator, first: Fact, count: int) -> Fact:
        if entry.name == "Split" and entry.domain == "":
            parts = tuple(Fact(view.argument(0).dtype, shape) for shape in split_shapes(view, count))
        else:
            parts = (replace(first, elements=None), *self._ask_function(view, entry).parts[1:])
        return Fact(parts=parts)

    def _ask_function(self, view: View, entry: Operator) -> Fact:
        """Run the torch function on tensors without data, where all sizes are static."""
        if any(view.has(i) and view.argument(i).value is None for i in entry.values):
            return UNKNOWN
        args: list[Any] = []
        for index, given in enumerate(view.node.args):
            fact = view.argument(index)
            if given is None:
                args.append(None)
            elif index in entry.values:
                args.append(fact.value)
            elif fact.dtype is not None and fact.shape is not None and static(fact.shape):
                args.append(torch.empty(fact.shape, dtype=fact.dtype, device="meta"))
            else:
                return UNKNOWN
        return _asked(entry, args, self.folder.keywords(view.node))


def _spelt(fact: Fact) -> bool:
    """Whether all elements are known numbers that fit the type."""
    if not static(fact.elements) or not static(fact.shape) or fact.dtype not in (*SIZES, torch.bool):
        return False
    if fact.dtype == torch.bool:
        return True
    bounds = torch.iinfo(fact.dtype)
    return all(bounds.min <= e <= bounds.max for e in fact.elements or ())


def _asked(entry: Operator, args: list[Any], kwargs: dict[str, Any]) -> Fact:
    try:
        result = entry.function(*args, **kwargs)
    except Exception:  # a dialect function raises whatever torch does on what it does not cover
        return UNKNOWN
    if isinstance(result, torch.Tensor):
        return Fact(result.dtype, tuple(result.shape))
    if isinstance(result, tuple) and all(isinstance(r, torch.Tensor) for r in result):
        return Fact(parts=tuple(Fact(r.dtype, tuple(r.shape)) for r in result))
    return UNKNOWN


def _declared(node: fx.Node) -> Fact:
    """What torch.export recorded; its symbols are bound by the guards of the export."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return UNKNOWN
    return Fact(value.dtype, tuple(d if isinstance(d, int) else plain(d.node.expr) for d in value.shape))


def _ours(node: fx.Node) -> bool:
    return str(node.target).startswith("graphopt.cleanup.")


def _overridable(graph: Graph) -> frozenset[str]:
    # Of a body nothing can be fed from outside.
    if graph.onnx is None or graph.body is not None or graph.onnx.proto.ir_version < _IR_OF_DEFAULTS:
        return frozenset()
    proto = graph.onnx.proto.graph
    return frozenset(stored(proto) & {i.name for i in proto.input} | trained(graph.onnx.proto))


def _packed(graph: Graph) -> frozenset[str]:
    """ONNX names of weights of 2- and 4-bit types, which torch holds in a wider one."""
    if graph.onnx is None:
        return frozenset()
    found: set[str] = set()
    # A body sees the weights of the scopes around it.
    for proto in graphs(graph.onnx.proto):
        found.update(t.name for t in proto.initializer if t.data_type not in TORCH_DTYPES)
        for node in proto.node:
            if node.op_type == "Constant" and _is_packed(node):
                found.update(node.output)
    return frozenset(found)


def _is_packed(message: Any) -> bool:
    """Whether an initialiser, or a Constant node, is of such a type."""
    if isinstance(message, onnx.NodeProto):
        return any(a.HasField("t") and _is_packed(a.t) for a in message.attribute)
    return isinstance(message, onnx.TensorProto) and message.data_type not in TORCH_DTYPES
