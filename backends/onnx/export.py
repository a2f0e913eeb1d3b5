"""A graph from an nn.Module as ONNX: exported by torch, then our own operators lowered as in any ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.backends.onnx.emit import to_proto
from graphopt.errors import GraphOptError
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.onnxfile import OnnxFile

_DOMAIN = "graphopt.ops"
"""Marks our operators between torch's exporter and our lowering; no saved model holds it."""
_PREFIX = "program."
_LOWEST = 18
"""The lowest opset that torch's exporter translates to."""


def export(graph: Graph, target: str) -> onnx.ModelProto:
    """The ONNX model of a graph that came from an nn.Module, with its names and dynamic dims.

    Args:
        graph: the graph.
        target: `onnx` or `onnxruntime`.

    Raises:
        GraphOptError: torch cannot translate an operator.
    """
    values = _example(graph)
    proto = _export_by_torch(graph, values)
    _strip_prefix(proto)
    file = OnnxFile(proto)
    if not any(node.domain == _DOMAIN for node in proto.graph.node):
        return proto
    onnx_graph = load_onnx(file)
    _adopt_operators(onnx_graph)
    _observe(onnx_graph, values)
    result = to_proto(onnx_graph, target)
    imports = [o for o in result.opset_import if o.domain != _DOMAIN]
    del result.opset_import[:]
    result.opset_import.extend(imports)
    return result


class _Program(torch.nn.Module):
    """Runs the graph on flat values, our operators as symbolic ONNX nodes."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.program = graph.module
        self._count = len(graph.inputs)

    def forward(self, *values: Any) -> tuple[Any, ...]:
        result = _Symbolic(self.program).run(*values, enable_io_processing=False)
        flat = torch.utils._pytree.tree_leaves(result)
        return tuple(x for x in flat if isinstance(x, torch.Tensor))


class _Symbolic(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            return result
        namespace, _, name = packet._qualified_op_name.partition("::")
        if namespace != "graphopt":
            return result
        schema = packet.default._schema
        bound = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        inputs = [bound.get(a.name) for a in schema.arguments if "Tensor" in str(a.type)]
        attributes = {
            a.name: _plain(bound.get(a.name, a.default_value)) for a in schema.arguments if "Tensor" not in str(a.type)
        }
        domain_name = f"{_DOMAIN}::{name}"
        if isinstance(result, torch.Tensor):
            return torch.onnx.ops.symbolic(
                domain_name, inputs, attributes, dtype=result.dtype, shape=result.shape, version=1
            )
        types, shapes = [x.dtype for x in result], [x.shape for x in result]
        return torch.onnx.ops.symbolic_multi_out(
            domain_name, inputs, attributes, dtypes=types, shapes=shapes, version=1
        )


def _plain(value: Any) -> Any:
    """An attribute that loses nothing: ONNX has no booleans, and floats of 32 bits."""
    if isinstance(value, bool):
        return int(value)
    return repr(value) if isinstance(value, float) else value


def _example(graph: Graph) -> list[Any]:
    source: Any = graph.source
    values: list[Any] = source.calling.flatten(source.example_args, source.example_kwargs, graph.inputs)
    return values


def _export_by_torch(graph: Graph, values: list[Any]) -> onnx.ModelProto:
    shapes = tuple(
        {i: d for i, d in enumerate(spec.shape or ()) if isinstance(d, str)} or None for spec in graph.inputs
    )
    try:
        with _quiet():
            program = torch.onnx.export(
                _Program(graph).eval(),
                tuple(values),
                dynamo=True,
                opset_version=_LOWEST,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                dynamic_shapes=(shapes,) if any(shapes) else None,
                external_data=False,
            )
    except Exception as error:  # tracing may raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphOptError(f"torch cannot export this graph to ONNX: {reason}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps and warns about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip_prefix(proto: onnx.ModelProto) -> None:
    """Give the weights back the names that they have in the module."""
    names = {t.name: t.name.removeprefix(_PREFIX) for t in proto.graph.initializer if t.name.startswith(_PREFIX)}
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for info in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        info.name = names.get(info.name, info.name)
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def _adopt_operators(graph: Graph) -> None:
    """Turn the symbolic nodes back into calls of our operators, which the lowering knows."""
    for node in list(graph.nodes):
        origin = node.meta.get("onnx")
        if node.op != "call_module" or origin is None or origin.proto.domain != _DOMAIN:
            continue
        packet = getattr(torch.ops.graphopt, origin.proto.op_type)
        arguments = packet.default._schema.arguments
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in origin.proto.attribute}
        tensors = iter(node.args)
        bound: dict[str, Any] = {}
        for argument in arguments:
            if "Tensor" in str(argument.type):
                bound[argument.name] = next(tensors, None)
            elif argument.name in attributes:
                bound[argument.name] = _typed(attributes[argument.name], str(argument.type))
        with graph.fx.inserting_before(node):
            call = graph.fx.call_function(packet, tuple(bound.values()))
        name = {k: v for k, v in node.meta.items() if k == "onnx_name"}
        call.meta = {"graphopt_site": origin.proto.name}
        value = call
        if len(packet.default._schema.returns) > 1 and len(origin.proto.output) == 1:
            # The exporter drops trailing outputs that nothing reads, and a node with one output is that output.
            with graph.fx.inserting_before(node):
                value = graph.fx.call_function(operator.getitem, (call, 0))
        value.meta.update(name)
        node.replace_all_uses_with(value)
        graph.fx.erase_node(node)
    graph.module.recompile()


def _typed(value: Any, kind: str) -> Any:
    if isinstance(value, bytes):
        text = value.decode()
        return float(text) if kind == "float" else text
    return bool(value) if kind == "bool" else value


def _observe(graph: Graph, values: list[Any]) -> None:
    """Note type, rank and shape of every value, as the lowering asks for them."""

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            node.meta.update(dtype=value.dtype, rank=value.ndim, shape=tuple(value.shape))

    with torch.no_grad():
        execute(graph, values, note)
