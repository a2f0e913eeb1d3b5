"""Bytes of weights, and of activations along the order of execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from torch import fx

from graphopt.graph import Graph
from graphopt.shapes import Shapes
from graphopt.shapes.express import SymbolicValue

# Results that share their operand's memory, in torch and in onnxruntime alike.
_ALIAS_NAMES = """
    Identity Reshape Flatten Squeeze Unsqueeze aten::view aten::_unsafe_view aten::reshape aten::squeeze
    aten::unsqueeze aten::flatten aten::alias aten::detach aten::t aten::transpose aten::permute aten::expand
    aten::slice aten::select aten::split aten::split_with_sizes aten::chunk aten::unbind getitem
"""
_ALIASES = frozenset(_ALIAS_NAMES.split())
_STRING_BYTES = 8


@dataclass(frozen=True)
class Weights:
    """What the graph's own tensors amount to."""

    parameters: Mapping[str, int]
    """Number of elements by element type: floating point, and quantised to 8 bits or fewer."""
    bytes: int
    """Of all tensors that the graph uses, index tables and constants included."""


def weights(graph: Graph) -> Weights:
    """Count each tensor once, however often it is used; the bytes themselves are not read."""
    parameters: dict[str, int] = {}
    total = 0
    seen: set[object] = set()
    for tensor in _tensors(graph):
        key = _identity(tensor)
        if key in seen:
            continue
        seen.add(key)
        total += tensor.numel() * tensor.element_size()
        if tensor.is_floating_point() or (tensor.element_size() == 1 and tensor.dtype != torch.bool):
            name = str(tensor.dtype).removeprefix("torch.")
            parameters[name] = parameters.get(name, 0) + tensor.numel()
    return Weights(parameters, total)


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that share all their memory."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # fake tensors and other subclasses have none
        address = 0
    return (address, tensor.dtype, tensor.shape) if address else id(tensor)


def _tensors(graph: Graph) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            value = graph.weight(node)
            found += [value] if isinstance(value, torch.Tensor) else []
        elif node.op == "call_module":
            module = graph.module.get_submodule(str(node.target))
            found += [*module.parameters(), *module.buffers()]
    return found


@dataclass(frozen=True)
class Peak:
    """The moment at which most activation memory is in use."""

    bytes: sympy.Expr
    node: str
    """The node that is being computed then."""
    unknown: tuple[str, ...]
    """Nodes whose size is not counted."""


def peak(graph: Graph, shapes: Shapes, kinds: Mapping[fx.Node, str], sizes: Mapping[sympy.Symbol, int]) -> Peak:
    """Liveness over the order of execution.

    A value lives from its node (inputs: from the start) to its last use, outputs to the end. Stored weights do not
    count, what nodes compute from them does. Reshapes and the like share their operand's memory.

    Args:
        graph: the graph.
        shapes: its shapes.
        kinds: what each node is.
        sizes: the assignment at which the moment is chosen.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    owner = _owners(nodes, kinds)
    last = _last_uses(graph, nodes, owner)
    exact: dict[fx.Node, sympy.Expr] = {}
    unknown = []
    for node in nodes:
        if owner[node] is not node or node.op == "get_attr":
            continue
        values = shapes.outputs(node)
        if node in shapes.unknown or any(v is None for v in values):
            unknown.append(node.name)
        exact[node] = sympy.Add(*(_bytes(v) for v in values if v is not None))
    memo: dict[sympy.Expr, float] = {}
    numeric = {node: _number(size, sizes, memo) for node, size in exact.items()}
    live = {node for node in exact if node.op == "placeholder"}
    now = best = sum(numeric[node] for node in live)
    moment, most = (nodes[0].name if nodes else ""), frozenset(live)
    for index, node in enumerate(nodes):
        if node in exact and node not in live:
            live.add(node)
            now += numeric[node]
        if now > best:
            best, moment, most = now, node.name, frozenset(live)
        for done in [n for n in last.get(index, ()) if n in live]:
            live.discard(done)
            now -= numeric[done]
    return Peak(sympy.expand(_sum([exact[node] for node in most])), moment, tuple(unknown))


def _owners(nodes: list[fx.Node], kinds: Mapping[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        shared = kinds.get(node) in _ALIASES and node.all_input_nodes
        owner[node] = owner[node.all_input_nodes[0]] if shared else node
    return owner


def _last_uses(graph: Graph, nodes: list[fx.Node], owner: Mapping[fx.Node, fx.Node]) -> dict[int, list[fx.Node]]:
    """By position: the values that nobody needs afterwards."""
    position = {owner[node]: index for index, node in enumerate(nodes) if owner[node] is node}
    for index, node in enumerate(nodes):
        for source in (*node.all_input_nodes, node):
            position[owner[source]] = index
    for node in graph.results:
        if isinstance(node, fx.Node):
            position[owner[node]] = len(nodes)
    last: dict[int, list[fx.Node]] = {}
    for node, index in position.items():
        last.setdefault(index, []).append(node)
    return last


def _bytes(value: SymbolicValue) -> sympy.Expr:
    if value.shape is None:
        return sympy.Integer(0)
    each = value.dtype.itemsize if isinstance(value.dtype, torch.dtype) else _STRING_BYTES
    return each * sympy.Mul(*value.shape)


def _sum(terms: list[sympy.Expr]) -> sympy.Expr:
    return sympy.Add(*terms)


def _number(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int], memo: dict[sympy.Expr, float]) -> float:
    if expression not in memo:
        memo[expression] = float(expression.subs(sizes)) if expression.free_symbols else float(expression)
    return memo[expression] if np.isfinite(memo[expression]) else 0.0
