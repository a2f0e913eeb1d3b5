"""Mutations of a model that keep most of it valid: of protobuf fields, of the wiring, and by parts of other models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

# An input that passes this is cut back to what it was made from: large inputs say no more than small ones.
LARGEST = 8192
_INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    64,
    65,
    255,
    1000,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 62) + 1,
    (1 << 63) - 1,
    -(1 << 63),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e38, math.inf, -math.inf, math.nan)
_TEXTS = (
    "",
    "x",
    "y",
    "class",
    "self",
    "forward",
    "__class__",
    "a.b",
    '"',
    "\n",
    "x)",
    "\0",
    "ß",
    "µ",
    "ai.onnx",
    "com.microsoft",
)
_BYTES = (b"", b"\0", b"\xff\xfe", b"linear", b"a" * 100, bytes(16))


def mutated(model: onnx.ModelProto, random: Random, donors: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """A copy of `model` with one to four mutations.

    Args:
        model: the model.
        random: decides everything.
        donors: other models, whose parts may go into it.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        change = random.choice(_CHANGES)
        change(twin, random, random.choice(donors) if donors else twin)
        if twin.ByteSize() > LARGEST:
            twin.CopyFrom(model)
    return twin


def _field(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Change one field of one message anywhere in the model."""
    message: Any = model
    while True:
        held = message.ListFields()
        if not held or random.random() < 0.1:
            _set(message, random.choice(message.DESCRIPTOR.fields), random)
            return
        descriptor, value = random.choice(held)
        if descriptor.type != Field.TYPE_MESSAGE:
            _set(message, descriptor, random)
            return
        if random.random() < 0.1:
            _reshape(message, descriptor, random)
            return
        message = random.choice(value) if descriptor.is_repeated else value


def _set(message: Any, descriptor: Any, random: Random) -> None:
    """Give a field another value, or a repeated one another entry."""
    if descriptor.type == Field.TYPE_MESSAGE:
        _reshape(message, descriptor, random)
        return
    if not descriptor.is_repeated:
        if random.random() < 0.1:
            message.ClearField(descriptor.name)
        else:
            setattr(message, descriptor.name, _scalar(descriptor, getattr(message, descriptor.name), random))
        return
    values = getattr(message, descriptor.name)
    place = random.randrange(len(values) + 1)
    if place == len(values) or random.random() < 0.2:
        values.insert(place, _scalar(descriptor, values[-1] if values else None, random))
    elif random.random() < 0.2:
        del values[place]
    else:
        values[place] = _scalar(descriptor, values[place], random)


def _scalar(descriptor: Any, old: Any, random: Random) -> Any:
    kind = descriptor.cpp_type
    if kind in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return random.choice(_FLOATS)
    if kind == Field.CPPTYPE_ENUM:
        return random.choice(descriptor.enum_type.values).number
    if kind == Field.CPPTYPE_STRING:
        if descriptor.type == Field.TYPE_BYTES:
            choices = (*_BYTES, (old or b"")[:-1], (old or b"") * 2)
            return random.choice(choices)
        return random.choice((*_TEXTS, (old or "") + "x", (old or "")[:-1]))
    near = [old + 1, old - 1, -old, old ^ (1 << random.randrange(8))] if isinstance(old, int) else []
    value = random.choice((*_INTEGERS, *near, *near))
    bits = 32 if kind in (Field.CPPTYPE_INT32, Field.CPPTYPE_UINT32) else 64
    if kind in (Field.CPPTYPE_UINT32, Field.CPPTYPE_UINT64):
        return value % (1 << bits)
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _reshape(message: Any, descriptor: Any, random: Random) -> None:
    """Remove, repeat, swap or add messages."""
    if not descriptor.is_repeated:
        if message.HasField(descriptor.name) and random.random() < 0.5:
            message.ClearField(descriptor.name)
        else:
            getattr(message, descriptor.name).SetInParent()
        return
    values = getattr(message, descriptor.name)
    choice = random.randrange(4)
    if not values or choice == 0:
        values.add()
    elif choice == 1:
        del values[random.randrange(len(values))]
    elif choice == 2:
        values.add().CopyFrom(random.choice(values))
    else:
        moved = [random.choice(values), *values]
        copies = [_copy(m) for m in moved[1:]]
        random.shuffle(copies)
        del values[:]
        values.extend(copies)


def _copy(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


def _graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [model.graph]
    for graph in found:
        for node in graph.node:
            for attribute in node.attribute:
                found += [attribute.g] if attribute.HasField("g") else []
                found += attribute.graphs
    return found


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = [node for graph in _graphs(model) for node in graph.node]
    return nodes + [node for function in model.functions for node in function.node]


def _names(model: onnx.ModelProto, random: Random) -> str:
    graph = random.choice(_graphs(model))
    names: list[str] = [*(i.name for i in graph.input), *(t.name for t in graph.initializer)]
    names += [name for node in graph.node for name in node.output]
    return random.choice([*names, ""])


def _rewire(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Let a node, or the graph's output, take another value."""
    node = random.choice(_nodes(model) or [onnx.NodeProto()])
    name = _names(model, random)
    if random.random() < 0.1 and model.graph.output:
        random.choice(model.graph.output).name = name
    elif node.input and random.random() < 0.8:
        node.input[random.randrange(len(node.input))] = name
    elif random.random() < 0.5:
        node.input.append(name)
    else:
        node.output.append(name)


def _operator(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Give a node the operator of another."""
    nodes, others = _nodes(model), _nodes(donor)
    if nodes and others:
        node, other = random.choice(nodes), random.choice(others)
        node.op_type, node.domain = other.op_type, other.domain
        if random.random() < 0.3:
            del node.attribute[:]
            node.attribute.extend(other.attribute)


def _transplant(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Copy a node, a weight, a function or an attribute of another model into this one."""
    graph = random.choice(_graphs(model))
    choice = random.randrange(4)
    if choice == 0 and donor.graph.node:
        graph.node.insert(random.randrange(len(graph.node) + 1), random.choice(donor.graph.node))
    elif choice == 1 and donor.graph.initializer:
        graph.initializer.append(random.choice(donor.graph.initializer))
    elif choice == 2 and donor.functions:
        model.functions.append(random.choice(donor.functions))
    else:
        given = [a for node in _nodes(donor) for a in node.attribute]
        taking = _nodes(model)
        if given and taking:
            random.choice(taking).attribute.append(random.choice(given))


def _append(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Put another model behind this one: its first input becomes a value of this one."""
    inner = _copy(donor.graph)
    known = {v.name for v in model.graph.input} | {n for node in model.graph.node for n in node.output}
    names = {n for node in inner.node for n in (*node.input, *node.output)} | {t.name for t in inner.initializer}
    renamed = {name: f"{name}_2" for name in names if name} | {v.name: _names(model, random) for v in inner.input[:1]}
    if not known:
        return
    for node in inner.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = renamed.get(name, name)
        model.graph.node.append(node)
    for tensor in inner.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
        model.graph.initializer.append(tensor)
    for value in (*inner.input[1:], *inner.output):
        value.name = renamed.get(value.name, value.name)
    model.graph.input.extend(inner.input[1:])
    model.graph.output.extend(inner.output)


def _nest(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Make the nodes the body of an If, a Loop or a Scan."""
    graph = random.choice(_graphs(model))
    outputs = [name for node in graph.node for name in node.output]
    if not outputs:
        return
    kind, name = random.choice((("If", "then_branch"), ("Loop", "body"), ("Scan", "body")))
    node = onnx.NodeProto(op_type=kind, input=[_names(model, random), _names(model, random)], output=outputs[-1:])
    body = onnx.GraphProto(name="body", node=graph.node)
    body.output.add(name=outputs[-1])
    node.attribute.append(onnx.helper.make_attribute(name, body))
    if kind == "If":
        del node.input[1:]
        node.attribute.append(onnx.helper.make_attribute("else_branch", _copy(body)))
    if kind == "Scan":
        node.attribute.append(onnx.helper.make_attribute("num_scan_inputs", 1))
    del graph.node[:]
    graph.node.append(node)


def _outline(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Make a node the body of a function, and call it."""
    nodes = list(model.graph.node)
    if not nodes:
        return
    node = random.choice(nodes)
    inputs, outputs = list(dict.fromkeys(filter(None, node.input))), list(filter(None, node.output))
    function = onnx.FunctionProto(name=f"F{len(model.functions)}", domain="local", input=inputs, output=outputs)
    function.node.add().CopyFrom(node)
    function.opset_import.extend(model.opset_import)
    model.functions.append(function)
    node.Clear()
    node.op_type, node.domain = function.name, "local"
    node.input.extend(inputs)
    node.output.extend(outputs)
    if random.random() < 0.5:
        model.opset_import.add(domain="local", version=1)


def _tensor(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Change a tensor's type, sizes, or where its bytes are."""
    found = [t for graph in _graphs(model) for t in graph.initializer]
    found += [a.t for node in _nodes(model) for a in node.attribute if a.HasField("t")]
    if not found:
        return
    tensor = random.choice(found)
    choice = random.randrange(5)
    if choice == 0:
        tensor.data_type = random.randrange(30)
    elif choice == 1:
        tensor.dims.append(random.choice(_INTEGERS))
    elif choice == 2 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_INTEGERS)
    elif choice == 3:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=random.choice(("w.bin", "../w.bin", "", "/etc/passwd")))
    else:
        tensor.raw_data = random.choice((*_BYTES, tensor.raw_data + b"\0", tensor.raw_data[:-1]))


def _sparse(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Store a weight sparsely."""
    graph = random.choice(_graphs(model))
    if not graph.initializer:
        return
    tensor = graph.initializer[random.randrange(len(graph.initializer))]
    sparse = graph.sparse_initializer.add(dims=tensor.dims)
    count = max(0, min(4, math.prod(tensor.dims)))
    sparse.values.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=1, dims=[count], float_data=[1.0] * count))
    indices = [random.choice((0, 1, 2, 3, i, -1, 1 << 40)) if random.random() < 0.1 else i for i in range(count)]
    sparse.indices.CopyFrom(onnx.TensorProto(data_type=7, dims=[count], int64_data=indices))
    graph.initializer.remove(tensor)


def _opset(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Import another version."""
    if model.opset_import:
        random.choice(model.opset_import).version = random.choice((*range(1, 30), *_INTEGERS))


def _again(model: onnx.ModelProto, random: Random, donor: onnx.ModelProto) -> None:
    """Repeat a node under new names, which leaves the model valid."""
    if not model.graph.node:
        return
    twin = _copy(random.choice(model.graph.node))
    for i, name in enumerate(twin.output):
        twin.output[i] = f"{name}_again" if name else ""
    model.graph.node.append(twin)


_CHANGES: tuple[Callable[[onnx.ModelProto, Random, onnx.ModelProto], None], ...] = (
    *[_field] * 8, *[_rewire] * 3, *[_tensor] * 2, *[_transplant] * 2, *[_append] * 2,
    _operator, _nest, _outline, _sparse, _opset, _again,
)  # fmt: skip


def broken(data: bytes, random: Random) -> bytes:
    """Bytes with a few of them changed, cut out, repeated or put in."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        place = random.randrange(len(changed) + 1)
        length = random.choice((1, 1, 2, 8, 64))
        choice = random.randrange(4)
        if choice == 0:
            changed[place : place + 1] = bytes([random.randrange(256)])
        elif choice == 1:
            del changed[place : place + length]
        elif choice == 2:
            changed[place:place] = changed[place : place + length]
        else:
            changed[place:place] = bytes(random.choice((0, 0x7F, 0x80, 0xFF)) for _ in range(length))
    return bytes(changed[:LARGEST])
