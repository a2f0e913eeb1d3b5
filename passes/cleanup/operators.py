"""What a node computes, by one name for dialect functions, ATen overloads and opaque nodes; and what is pure."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.dialect import operator_of
from graphopt.graph import Graph
from graphopt.subgraphs import SubgraphOperator, node_proto


def words(text: str) -> frozenset[str]:
    """The words of a text: a list of operators without the quotes."""
    return frozenset(text.split())


_DRAWS = ("Random", "Dropout", "Bernoulli", "Multinomial", "Sampling")
"""What the names of random operators contain."""
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


def operation(node: fx.Node) -> str:
    """`Reshape`, `com.microsoft::Gelu`, `aten.view.default`, `If`, `opaque Foo`, `getitem`; else the fx node's kind."""
    if node.op == "call_function":
        return _function_name(node.target)
    proto = opaque_proto(node)
    if proto is None or node.graph.owning_module is None:
        return node.op
    name = _qualified(proto.domain, proto.op_type)
    known = isinstance(node.graph.owning_module.get_submodule(str(node.target)), SubgraphOperator)
    return name if known else f"opaque {name}"


@functools.cache
def _function_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    entry = operator_of(target)
    if entry is not None:
        return _qualified(entry.domain, entry.name)
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _qualified(domain: str, name: str) -> str:
    return name if domain in ("", "ai.onnx") else f"{domain}::{name}"


def opaque_proto(node: fx.Node) -> onnx.NodeProto | None:
    """The ONNX node behind an opaque node, else None."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    module = node.graph.owning_module.get_submodule(str(node.target))
    return node_proto(module)


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its operands; then no two equal nodes need have equal values."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def pure(node: fx.Node, functions: Iterable[onnx.FunctionProto] = ()) -> bool:
    """Whether equal operands always give equal values; where that is unknown, no.

    Args:
        node: any node.
        functions: the model-local functions that an opaque node may call.
    """
    proto = opaque_proto(node)
    if proto is not None:
        return not _some(lambda n: _is_unknown(n) or _draws(n), [proto], functions)
    if node.op != "call_function" or _is_random(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        # These update running statistics in training, whatever their schema says.
        norm = node.target._schema.name in ("aten::batch_norm", "aten::instance_norm")
        return not (norm or _seeded(node) or node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return node.target._qualified_op_name.startswith("graphopt::")
    return node.target is operator.getitem or operator_of(node.target) is not None  # type: ignore[arg-type]  # callable


def may_act(node: fx.Node, functions: Iterable[onnx.FunctionProto] = ()) -> bool:
    """Whether the node, for all we know, does something beside computing its results, as printing does.

    Args:
        node: any node.
        functions: the model-local functions that an opaque node may call.
    """
    proto = opaque_proto(node)
    return proto is not None and _some(_is_unknown, [proto], functions)


def all_known(graph: Graph) -> bool:
    """Whether the graph holds no operator of which nothing is known."""
    functions = graph.onnx.proto.functions if graph.onnx is not None else ()
    return not any(may_act(node, functions) for node in graph.nodes)


def _seeded(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


def _is_random(node: fx.Node) -> bool:
    """Whether a dialect function draws; Dropout does in training only."""
    name = operation(node)
    if name == "Dropout":
        return len(node.args) > 2 and node.args[2] is not None
    return node.op == "call_function" and any(word in name for word in _DRAWS)


def _draws(node: onnx.NodeProto) -> bool:
    return any(word in node.op_type for word in _DRAWS)


def _is_unknown(node: onnx.NodeProto) -> bool:
    return node.domain not in _KNOWN_DOMAINS


def _some(
    test: Callable[[onnx.NodeProto], bool], nodes: Iterable[onnx.NodeProto], functions: Iterable[onnx.FunctionProto]
) -> bool:
    """Whether the test holds for one of the nodes; those in subgraphs and in called functions are looked at too."""
    known = {(f.domain, f.name, f.overload): f for f in functions}
    seen: set[tuple[str, str, str]] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        key = (node.domain, node.op_type, node.overload)
        pending += (inner for graph in _subgraphs(node) for inner in graph.node)
        if key not in known:
            if test(node):
                return True
        elif key not in seen:
            seen.add(key)
            pending += known[key].node
    return False


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def random_downstream(graph: Graph) -> set[fx.Node]:
    """The nodes whose values differ from run to run: random ones, and all that depend on them."""
    functions = graph.onnx.proto.functions if graph.onnx is not None else ()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        opaque = opaque_proto(node) is not None and not pure(node, functions)
        drawn = opaque or _seeded(node) or _is_random(node)
        if drawn or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
