"""One view of a node for both dialects: what it computes, its operands, its constants."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import onnx
import onnx.helper
import torch
from torch import fx

from graphopt.dialect import operator_of
from graphopt.sites.vocabulary_names import ATEN, FOLDABLE, MICROSOFT, ONNX
from graphopt.subgraphs import node_proto

if TYPE_CHECKING:
    from graphopt.graph import Graph

_PYTHON: dict[Any, str] = {
    operator.getitem: "getitem", operator.add: "add", operator.sub: "sub", operator.mul: "mul",
    operator.truediv: "div", operator.floordiv: "floordiv", operator.neg: "neg", operator.pow: "pow",
    math.sqrt: "sqrt", torch.sym_sqrt: "sqrt", torch.sym_float: "cast", torch.sym_int: "cast",
}  # fmt: skip

SAME_VALUE = frozenset({"identity", "cast", "dropout"})
"""Kinds whose value is that of their first operand, up to the precision of a cast between float types."""
SHAPES = frozenset({"shape", "size"})
"""Kinds that read the sizes of their operand, not its values."""
_LIKES = frozenset(
    {"full_like", "zeros_like", "ones_like", "empty_like", "new_full", "new_zeros", "new_ones", "new_empty"}
)
_FOLD_LIMIT = 1 << 16
_LAYOUT = frozenset({"identity", "unsqueeze", "squeeze", "reshape", "transpose"})


def kind(node: fx.Node) -> str:
    """The canonical name of what `node` computes: `matmul`, `softmax`, `add`, `transpose`, `getitem` ...

    Opaque nodes are named after their operator too, with their domain in front where it is not a known one.
    """
    if node.op == "get_attr":
        return "constant"
    if node.op == "call_module":
        proto = opaque_proto(node)
        return "module" if proto is None else _onnx_kind(proto.domain, proto.op_type)
    if node.op == "call_method":
        return ATEN.get(str(node.target), str(node.target))
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return _aten_kind(node.target)
    entry = operator_of(node.target)  # type: ignore[arg-type]  # a call_function target is callable
    if entry is not None:
        return _onnx_kind(entry.domain, entry.name)
    name = getattr(node.target, "__name__", str(node.target))
    return _PYTHON.get(node.target, ATEN.get(name, name))


@functools.cache
def _aten_kind(target: torch._ops.OpOverload) -> str:
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten":
        return f"{namespace}::{name}"
    if name not in ATEN and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # functionalised graphs hold few in-place operators, but some they do
    return ATEN.get(name, name)


@functools.cache
def _onnx_kind(domain: str, name: str) -> str:
    if domain in ("", "ai.onnx"):
        return ONNX.get(name, _snake(name))
    if domain == "com.microsoft":
        return MICROSOFT.get(name, _snake(name))
    return f"{domain}::{_snake(name)}"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def opaque_proto(node: fx.Node) -> onnx.NodeProto | None:
    """The ONNX node behind an opaque node, else None."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    origin = node.meta.get("onnx")
    if origin is not None:
        proto: onnx.NodeProto = origin.proto
        return proto
    module = node.graph.owning_module.get_submodule(str(node.target))
    return node_proto(module)


def attributes(node: fx.Node) -> Mapping[str, Any]:
    """Attributes by their ONNX names, or the keyword arguments of any other call."""
    proto = opaque_proto(node)
    if proto is None:
        return node.kwargs
    found: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
    return found


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword, or `default` where it is left out or None."""
    value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
    return default if value is None else value


def operands(node: fx.Node) -> tuple[fx.Node | None, ...]:
    """The positional arguments that are nodes, None for holes and plain values; lists are flattened."""
    found: list[fx.Node | None] = []
    for arg in node.args:
        items = arg if isinstance(arg, (list, tuple)) else (arg,)
        found += [item if isinstance(item, fx.Node) else None for item in items]
    return tuple(found)


def parents(node: fx.Node) -> list[fx.Node]:
    """Every node that `node` reads, get_attr nodes included."""
    return node.all_input_nodes


def users(node: fx.Node) -> list[fx.Node]:
    """The nodes that read `node`, in graph order."""
    return list(node.users)


def source(node: fx.Node) -> fx.Node | None:
    """The first operand, the only one of a unary operator."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return first if isinstance(first, fx.Node) else None


def narrows(node: fx.Node) -> bool:
    """Whether a cast changes more than the precision: to integers or booleans, or from them."""
    given = source(node)
    types = [_cast_type(node), None if given is None else _static_dtype(given)]
    return any(t is not None and not t.is_floating_point for t in types)


def _cast_type(node: fx.Node) -> torch.dtype | None:
    for value in (*node.args[1:], *node.kwargs.values()):
        if isinstance(value, torch.dtype):
            return value
    code = node.kwargs.get("to")
    if isinstance(code, int):
        from graphopt.dialect.dtypes import dtype_of

        try:
            return dtype_of(code)
        except NotImplementedError:
            return torch.int8
    return None


def _static_dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.dtype
    if kind(node) in ("equal", "not", "and", "or", "greater", "less", "isnan", "greater_equal", "less_equal"):
        return torch.bool
    return _cast_type(node) if kind(node) == "cast" else None


def skip(node: fx.Node, kinds: Iterable[str] = SAME_VALUE) -> fx.Node:
    """Walk from `node` towards its producers through operators that keep the value."""
    kinds = frozenset(kinds)
    while (name := kind(node)) in kinds or (name == "getitem" and _first_of_dropout(node)):
        given = source(node)
        if given is None or (name == "cast" and narrows(node)):
            return node
        node = given
    return node


def _first_of_dropout(node: fx.Node) -> bool:
    given = source(node)
    return given is not None and kind(given) == "dropout" and bool(node.args[1] == 0)


def constant(graph: Graph, node: Any) -> torch.Tensor | None:
    """The value of a weight, or of a small expression of constants; None where it depends on an input."""
    return _constant(graph, node, {})


def _constant(graph: Graph, node: Any, seen: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    if isinstance(node, (bool, int, float)):
        return torch.tensor(node)
    if isinstance(node, torch.Tensor):
        return node
    if not isinstance(node, fx.Node):
        return None
    if node not in seen:
        seen[node] = None  # breaks off where a graph is deeper than it should be
        seen[node] = _fold(graph, node, seen)
    return seen[node]


def _fold(graph: Graph, node: fx.Node, seen: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    if node.op == "get_attr":
        value = graph.weight(node)
        return value.detach() if isinstance(value, torch.Tensor) else None
    name = kind(node)
    if name not in FOLDABLE or node.op != "call_function":
        return None
    limit = math.inf if name in _LAYOUT else _FOLD_LIMIT
    values: dict[fx.Node, torch.Tensor] = {}
    for parent in parents(node):
        value = _constant(graph, parent, seen)
        if value is None or value.numel() > limit:
            return None
        values[parent] = value
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    try:
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target is callable
    except Exception:  # whatever torch says about an impossible fold, the node is then no constant
        return None
    return torch.as_tensor(result) if isinstance(result, (torch.Tensor, int, float, bool)) else None


def scalar(graph: Graph, value: Any) -> float | None:
    """A Python number, or the one element of a constant; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    found = constant(graph, value)
    if found is None or found.numel() != 1:
        return None
    return float(found.reshape(()).to(torch.float64).item())


def permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The permutation of a `transpose` node on `rank` axes, None for any other node."""
    if kind(node) != "transpose":
        return None
    name = getattr(node.target, "_opname", "") or getattr(node.target, "__name__", str(node.target))
    if name.startswith(("permute", "transpose_1")) or "perm" in node.kwargs:
        given = node.kwargs.get("perm", node.kwargs.get("dims", node.args[1] if len(node.args) > 1 else None))
        order = list(given) if isinstance(given, (list, tuple)) else list(range(rank))[::-1]
        return tuple(int(axis) % rank for axis in order)
    order = list(range(rank))
    if name in ("transpose", "swapaxes"):
        a, b = (int(argument(node, i, f"dim{i - 1}")) % rank for i in (1, 2))
    elif rank >= 2 and name in ("t", "mT"):
        a, b = rank - 2, rank - 1
    elif name == "numpy_T":
        return tuple(reversed(order))
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def axis(node: fx.Node, default: int = -1) -> int:
    """The axis that a softmax, concat, split, gather or select works along, as it is written."""
    entry = operator_of(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]  # callable
    if entry is not None or node.op == "call_module":
        return int(attributes(node).get("axis", _default_axis(node, entry, default)))
    value = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else default))
    return int(value) if isinstance(value, int) else default


def _default_axis(node: fx.Node, entry: Any, default: int) -> int:
    if entry is None:
        return default
    parameter = inspect.signature(entry.function).parameters.get("axis")
    known = parameter.default if parameter is not None else None
    return known if isinstance(known, int) else default


def softmax_axis(node: fx.Node, rank: int) -> int | None:
    """The one axis (from 0) that a softmax normalises over; None where it flattens several (opset < 13)."""
    along = axis(node) % rank
    entry = operator_of(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]  # callable
    if entry is not None and entry.name == "Softmax" and entry.since < 13 and along != rank - 1:
        return None
    return along


def name_of(node: fx.Node) -> str:
    """The name under which the model's author knows a node: the ONNX node's or value's, else fx's."""
    origin = node.meta.get("onnx")
    if origin is not None and origin.proto.name:
        return str(origin.proto.name)
    return str(node.meta.get("onnx_name") or node.meta.get("onnx_stem") or node.name)


def ancestors(
    nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None, limit: int | None = None
) -> set[fx.Node]:
    """`nodes` and all that they depend on; nodes for which `stop` holds are kept, but not looked behind."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending and (limit is None or len(found) < limit):
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if stop is None or not stop(node):
            pending += parents(node)
    return found


def value_parents(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values `node` reads, not only their sizes or element types."""
    if kind(node) in SHAPES or kind(node) in _LIKES:
        return []
    entry = operator_of(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]  # callable
    packet = getattr(node.target, "_opname", "")
    if (entry is not None and entry.name == "CastLike") or packet in ("expand_as", "view_as", "type_as"):
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return parents(node)


def value_ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and all whose values they depend on."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += value_parents(node)
    return found


def depends_on_values(node: fx.Node) -> bool:
    """Whether `node` depends on the values of an input, not only on sizes and weights."""
    return any(n.op == "placeholder" for n in value_ancestors([node]))
