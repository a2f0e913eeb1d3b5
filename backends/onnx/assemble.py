"""Putting a graph's message, and the model's, together from emitted nodes and from what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.helper
import torch
from google.protobuf.unknown_fields import UnknownFieldSet
from torch import fx

from graphopt.backends.onnx.builder import ModelParts
from graphopt.graph import Graph, ValueSpec
from graphopt.onnxfile.scopes import captured, defined, is_constant, stored
from graphopt.onnxfile.tensors import ONNX_DTYPES

# Before this IR version every initialiser also stands among the inputs.
_IR_OF_OWN_INITIALISERS = 4
_IR_OF_FUNCTIONS = 8
# Fields that depend on the nodes; all others are taken over as they are.
_OWN = ("node", "initializer", "sparse_initializer", "value_info", "input", "output", "quantization_annotation")


@dataclass(frozen=True)
class Emitted:
    """What became of a graph."""

    nodes: Sequence[onnx.NodeProto]
    places: Sequence[int]
    """Of each node, its index in the graph that was read; -1 for a new one."""
    outputs: Sequence[str]
    live: set[str]
    """Names of the weights that are in use."""
    front: Sequence[onnx.NodeProto] = ()
    """Constant nodes that came out of bodies."""
    added_inputs: Sequence[ValueSpec] = ()
    added_outputs: Sequence[ValueSpec] = ()
    """What a pass has added to the interface."""
    resized: Mapping[str, ValueSpec] = field(default_factory=dict)
    """Outputs, by name, to which a pass has given other sizes."""


def live_weights(
    graph: Graph, names: Mapping[fx.Node, str], nodes: Sequence[onnx.NodeProto], parts: ModelParts
) -> set[str]:
    """Names of the weights that are in use: in the graph, in the bodies below it, and beside the graph."""
    weights = [n for n in graph.nodes if n.op == "get_attr" and n in names and "onnx_replaces" not in n.meta]
    own = {names[n] for n in weights}
    live: set[str] = own.union(*(captured(node) for node in nodes))
    return live if graph.body is not None else live | parts.pinned


def assemble(new: onnx.GraphProto, old: onnx.GraphProto, emitted: Emitted) -> None:
    """Fill `new` with the emitted nodes and with what `old` says beside its nodes."""
    keep_unknown_fields(new, old)
    live = emitted.live
    for descriptor, value in old.ListFields():
        if descriptor.name not in _OWN:
            _set(new, descriptor.name, value)
    new.node.extend([*emitted.front, *_with_constants_of_bodies(old, emitted)])
    removed = stored(old) - live
    new.initializer.extend(t for t in old.initializer if t.name in live)
    new.sparse_initializer.extend(s for s in old.sparse_initializer if s.values.name in live)
    new.input.extend(i for i in old.input if i.name not in removed)
    new.input.extend(map(_value_info, emitted.added_inputs))
    new.output.extend(_resized(o, emitted.resized[o.name]) if o.name in emitted.resized else o for o in old.output)
    new.output.extend(map(_value_info, emitted.added_outputs))
    for output, name in zip(new.output, emitted.outputs, strict=True):
        output.name = name
    # Some files describe values that nothing defines; only what was removed here loses its description.
    gone = defined(old) - defined(new)
    new.value_info.extend(v for v in old.value_info if v.name not in gone)
    new.quantization_annotation.extend(a for a in old.quantization_annotation if a.tensor_name not in gone)


def _value_info(spec: ValueSpec) -> onnx.ValueInfoProto:
    assert isinstance(spec.dtype, torch.dtype)
    shape = None if spec.shape is None else list(spec.shape)
    return onnx.helper.make_tensor_value_info(spec.name, ONNX_DTYPES[spec.dtype], shape)


def _resized(output: onnx.ValueInfoProto, spec: ValueSpec) -> onnx.ValueInfoProto:
    """The same declaration with the sizes of `spec`."""
    new = onnx.ValueInfoProto()
    new.CopyFrom(output)
    new.type.tensor_type.shape.CopyFrom(_value_info(spec).type.tensor_type.shape)
    return new


def _with_constants_of_bodies(old: onnx.GraphProto, emitted: Emitted) -> list[onnx.NodeProto]:
    """The emitted nodes, and the Constant nodes that bodies use, or used: those see them by name, without an edge."""
    made = {name for node in emitted.nodes for name in node.output}
    lost = {
        node.output[0]: index
        for index, node in enumerate(old.node)
        if is_constant(node) and node.output[0] in emitted.live and node.output[0] not in made
    }
    nodes: list[onnx.NodeProto] = []
    for node, place in zip(emitted.nodes, emitted.places, strict=True):
        used = (*node.input, *captured(node)) if lost else ()
        for name, index in list(lost.items()):
            if index < place or name in used:
                nodes.append(old.node[lost.pop(name)])
        nodes.append(node)
    return nodes + [old.node[index] for index in lost.values()]


def finish(model: onnx.ModelProto, parts: ModelParts) -> None:
    """Give the model with the new graph everything else that the old one has, and what lowering adds."""
    for descriptor, value in parts.source.proto.ListFields():
        if descriptor.name != "graph":
            _set(model, descriptor.name, value)
    model.graph.initializer.extend(parts.initializers)
    model.graph.sparse_initializer.extend(parts.sparse_initializers)
    model.functions.extend(parts.functions.values())
    if parts.functions:
        model.ir_version = max(model.ir_version, _IR_OF_FUNCTIONS)
    if model.ir_version < _IR_OF_OWN_INITIALISERS:
        model.graph.input.extend(map(_declared, parts.initializers))
    _import(model, parts.domains)


def _declared(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _import(model: onnx.ModelProto, domains: Mapping[str, int]) -> None:
    """Import what was used, and drop no import: other tools look for theirs."""
    present = {o.domain for o in model.opset_import}
    for domain in sorted(domains.keys() - present):
        model.opset_import.add(domain=domain, version=domains[domain])


def keep_unknown_fields(new: Any, old: Any) -> None:
    """Take over the fields that a later version of the standard has added; `new` is empty."""
    if not len(UnknownFieldSet(old)):
        return
    new.CopyFrom(old)  # there is no other way to copy them
    for descriptor, _ in old.ListFields():
        new.ClearField(descriptor.name)


def _set(message: Any, name: str, value: Any) -> None:
    field = getattr(message, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(message, name, value)
