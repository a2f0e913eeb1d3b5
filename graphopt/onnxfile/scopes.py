"""Names across nested ONNX scopes: what a subgraph takes from outside, and renaming it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

Memo = dict[int, tuple[onnx.NodeProto, tuple[str, ...]]]
"""What each node captures, by the id of the node, which is kept alive."""


def captured(node: onnx.NodeProto, memo: Memo | None = None) -> tuple[str, ...]:
    """Names that the node's subgraphs use but do not define, in order of first use.

    Args:
        node: any node.
        memo: remembers nodes with subgraphs; without it, bodies inside bodies are walked once for each level.
    """
    if memo is not None and id(node) in memo:
        return memo[id(node)][1]
    found: dict[str, None] = {}
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            for name in free(graph, memo):
                found.setdefault(name)
    names = tuple(found)
    if memo is not None and any(a.HasField("g") or a.graphs for a in node.attribute):
        memo[id(node)] = (node, names)
    return names


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    own = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
    return own + list(attribute.graphs)


def free(graph: onnx.GraphProto, memo: Memo | None = None) -> list[str]:
    """Names that a body uses but does not define, in order of use, with repetition."""
    own = defined(graph)
    found: list[str] = []
    for node in graph.node:
        found += [name for name in (*node.input, *captured(node, memo)) if name and name not in own]
    # A subgraph may return an outer value directly.
    return found + [o.name for o in graph.output if o.name and o.name not in own]


def defined(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph defines: its inputs, its weights, and what its nodes compute."""
    return given(graph) | {name for n in graph.node for name in n.output}


def given(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph defines without a node."""
    return stored(graph) | {i.name for i in graph.input}


def stored(graph: onnx.GraphProto) -> set[str]:
    """Names of a graph's own initialisers."""
    return {t.name for t in graph.initializer} | {s.values.name for s in graph.sparse_initializer}


def defined_within(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs define, at any depth."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            found |= defined(graph)
            for inner in graph.node:
                found |= defined_within(inner)
    return found


def is_constant(node: onnx.NodeProto) -> bool:
    """Whether the node is the standard's Constant."""
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def trained(model: onnx.ModelProto) -> set[str]:
    """Names of the weights that the model's own training assigns to: they are no constants."""
    bindings = (b for t in model.training_info for b in (*t.initialization_binding, *t.update_binding))
    return {binding.key for binding in bindings}


def mentioned(model: onnx.ModelProto) -> set[str]:
    """Names of the main graph that the model uses outside of it: for training, or to describe a quantisation."""
    found = trained(model)
    for training in model.training_info:
        found.update(free(training.initialization), free(training.algorithm))
    for annotation in model.graph.quantization_annotation:
        found.update(parameter.value for parameter in annotation.quant_parameter_tensor_names)
    return found


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of the node whose inputs and captured names are replaced by `names`."""
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    for i, name in enumerate(twin.input):
        twin.input[i] = names.get(name, name)
    rename_shards(twin, names)
    for attribute in twin.attribute:
        for graph in _graphs(attribute):
            _rename_free(graph, names)
    return twin


def rename_shards(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let the node's device configurations speak of the new names of its operands and results; in place."""
    for device in node.device_configurations:
        for spec in device.sharding_spec:
            spec.tensor_name = names.get(spec.tensor_name, spec.tensor_name)


def _rename_free(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    used = set(free(graph))
    outer = {old: new for old, new in names.items() if old in used}
    if not outer:
        return
    for i, node in enumerate(graph.node):
        graph.node[i].CopyFrom(rename(node, outer))
    for output in graph.output:
        output.name = outer.get(output.name, output.name)
