"""Model-local functions: which there are, and their bodies with a call's attributes put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from graphopt.errors import GraphOptError

Key = tuple[str, str, str]
"""Domain, name, overload."""


class Functions:
    """The model-local functions of a file."""

    def __init__(self, protos: Iterable[onnx.FunctionProto]) -> None:
        """Args: protos: the file's functions; none calls itself (`graphopt.onnxfile.checks` sees to that)."""
        self.protos = {_key(f.domain, f.name, f.overload): f for f in protos}
        self.all = tuple(self.protos.values())

    def of(self, node: onnx.NodeProto) -> onnx.FunctionProto | None:
        """The function that a node calls, if it calls one."""
        return self.protos.get(_key(node.domain, node.op_type, node.overload)) if self.protos else None


def check_call(function: onnx.FunctionProto, call: onnx.NodeProto) -> None:
    """Check a call's number of inputs and outputs.

    Raises:
        GraphOptError: the call has more than the function.
    """
    if len(call.input) > len(function.input) or len(call.output) > len(function.output):
        raise GraphOptError(
            f"node {call.name!r} has {len(call.input)} inputs and {len(call.output)} outputs, but the function "
            f"{function.name!r} that it calls has {len(function.input)} and {len(function.output)}; fix the model"
        )


def body(function: onnx.FunctionProto, call: onnx.NodeProto) -> onnx.GraphProto:
    """The function's body as a graph of its own, with the attributes of `call` in the place of references."""
    given = {a.name: a for a in function.attribute_proto} | {a.name: a for a in call.attribute}
    graph = onnx.GraphProto(name=function.name)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output[: len(call.output)])
    for node in function.node:
        _bind(graph.node.add(), node, given)
    graph.value_info.extend(function.value_info)
    return graph


def _bind(twin: onnx.NodeProto, node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> None:
    twin.CopyFrom(node)
    del twin.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name and attribute.ref_attr_name not in given:
            continue  # an attribute without a value is left out
        bound = twin.attribute.add()
        bound.CopyFrom(given[attribute.ref_attr_name] if attribute.ref_attr_name else attribute)
        bound.name = attribute.name
        for graph in [bound.g] if bound.type == onnx.AttributeProto.GRAPH else bound.graphs:
            for inner in graph.node:
                original = onnx.NodeProto()
                original.CopyFrom(inner)
                _bind(inner, original, given)


def _key(domain: str, name: str, overload: str) -> Key:
    return "" if domain == "ai.onnx" else domain, name, overload
