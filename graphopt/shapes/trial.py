"""Running one node for real on made-up values, where its output shapes depend on values that nobody knows yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.dialect.control import at_most
from graphopt.graph import Graph
from graphopt.opaque import OpaqueOperator
from graphopt.subgraphs import node_proto

# Inputs of a trial together stay below this, so that observing shapes never costs more than running the node.
_MOST_BYTES = 16 << 20
# A loop whose bound is not made up runs as long as the file says.
_MOST_TRIPS = 1000
# Decoders run the whole model once per generated token.
_NEVER = frozenset({"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"})


def callable_of(graph: Graph, node: fx.Node) -> Callable[..., Any] | None:
    """What runs the node on real values: its torch function, else onnxruntime."""
    if node.op == "call_module":
        module = graph.module.get_submodule(str(node.target))
        return None if node_proto(module) is None else module
    origin = node.meta.get("onnx")
    if origin is None or graph.onnx is None or not origin.holds_for(node):
        return node.target if callable(node.target) else None
    source = graph.onnx.proto
    types: Any = node.kwargs.get("types", ())
    opaque = OpaqueOperator(origin.proto, (), source.opset_import, source.functions, {}, types)
    function = node.target

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs) if callable(function) else opaque(*args)
        except NotImplementedError:
            return opaque(*args)

    return run


def trials(graph: Graph, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Results of the node with all unknown tensors zero and, where it accepts that, with all of them one.

    Where two results agree on a size, the size does not depend on the values (as far as two points can tell).
    Empty when the inputs are large, when the node may run for long, or when it fails.
    """
    function = callable_of(graph, node)
    if function is None or not _bounded(node, args):
        return []
    results = []
    for fill in (0, 1):
        made = _make(graph, node, args, fill)
        if made is None:
            return []
        try:
            # onnxruntime and dialect functions raise whatever they like on values that make no sense.
            with at_most(_MOST_TRIPS):
                results.append(function(*made, **pytree.tree_map(lambda x, fill=fill: _real(x, fill), kwargs)))
        except Exception:
            continue
    return results


def _bounded(node: fx.Node, args: Sequence[Any]) -> bool:
    origin = node.meta.get("onnx")
    kind = origin.proto.op_type if origin is not None else ""
    if kind in _NEVER:
        return False
    if kind != "Loop":
        return True
    trips = args[0] if args else None
    if isinstance(trips, torch.Tensor):
        return trips.is_meta or int(trips.reshape(-1)[0]) <= _MOST_TRIPS
    return False


def _make(graph: Graph, node: fx.Node, args: Sequence[Any], fill: int) -> list[Any] | None:
    total = 0
    made = []
    for source, value in zip(node.args, args, strict=True):
        if isinstance(source, fx.Node) and source.op == "get_attr":
            # The weight itself: opaque nodes recognise their constants by identity.
            value = graph.weight(source)
        total += sum(x.numel() * x.element_size() for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))
        if total > _MOST_BYTES:
            return None
        made.append(pytree.tree_map(lambda x: _real(x, fill), value))
    return made


def _real(value: Any, fill: int) -> Any:
    if isinstance(value, torch.Tensor) and value.is_meta:
        return torch.full(value.shape, fill, dtype=torch.float32).to(value.dtype)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return np.full(value.shape, str(fill), dtype=object)
    return value
