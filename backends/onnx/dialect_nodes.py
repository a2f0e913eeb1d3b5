"""A new fx node that calls a dialect function is the ONNX operator of that function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.helper
import torch
from torch import fx

from graphopt.dialect import operator_of
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.onnxfile.tensors import to_tensor_proto


def dialect_node(graph: Graph, node: fx.Node, name_of: Callable[[Any], str], outputs: Sequence[str]) -> onnx.NodeProto:
    """The NodeProto of a call of a dialect function.

    Args:
        graph: holds the weights that tensor attributes refer to.
        node: the call.
        name_of: ONNX name of an argument, empty for None.
        outputs: names of the outputs.

    Raises:
        GraphOptError: an attribute is no ONNX attribute.
    """
    entry = operator_of(node.target)  # type: ignore[arg-type]  # a call_function's target is callable
    assert entry is not None
    inputs = [name_of(a) for a in node.args]
    while inputs and not inputs[-1]:
        inputs.pop()
    proto = onnx.helper.make_node(entry.name, inputs, list(outputs), name=node.name, domain=entry.domain or None)
    for key, value in node.kwargs.items():
        if value is None or (key == "outputs" and entry.counted) or (key == "types" and entry.typed):
            continue
        proto.attribute.append(_attribute(graph, key.rstrip("_"), value, entry.name))
    return proto


def _attribute(graph: Graph, name: str, value: Any, op_type: str) -> onnx.AttributeProto:
    if isinstance(value, fx.Node):
        value = graph.weight(value)
    if isinstance(value, torch.Tensor):
        return onnx.helper.make_attribute(name, to_tensor_proto(name, value))
    if isinstance(value, (list, tuple)):
        value = list(value)
        return onnx.helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS if not value else None)
    if isinstance(value, (bool, int, float, str)):
        return onnx.helper.make_attribute(name, int(value) if isinstance(value, bool) else value)
    raise GraphOptError(f"cannot lower {op_type}: attribute {name} has the value {value!r}")
