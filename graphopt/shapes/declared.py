"""What the model says about its own shapes: inferred or recorded ones of an ONNX file, `meta["val"]` of an export."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.helper
import onnx.shape_inference
import torch
from torch import fx

from graphopt.graph import Dim, Graph
from graphopt.onnxfile.isolation import isolated
from graphopt.onnxfile.read import is_external
from graphopt.onnxfile.tensors import TORCH_DTYPES

# Above this size a constant decides no shape, so that inference needs its type only.
_SHAPE_DATA = 1024
# protobuf serialises nothing above 2 GiB.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class DeclaredValue:
    """A shape as declared: sizes, names, or None for what is left open."""

    dtype: torch.dtype | str
    shape: tuple[Dim, ...]


class Declared:
    """Looks shapes up; the file's inference runs when it is first asked for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def values(self, node: fx.Node) -> list[DeclaredValue | None] | None:
        """One entry per output of the node, or None where nothing is known about it at all."""
        origin = node.meta.get("onnx")
        if origin is not None and self._graph.onnx is not None:
            if not origin.holds_for(node):
                return None
            found = [self._by_name.get(name) for name in origin.proto.output]
            return found if any(found) else None
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return [_from_fake(value)]
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, torch.Tensor) for v in value):
            return [_from_fake(v) for v in value]
        return None

    @functools.cached_property
    def _by_name(self) -> dict[str, DeclaredValue]:
        source, proto = self._graph.onnx, self._graph.proto
        assert source is not None
        assert proto is not None
        # A recorded shape may be older than the interface that somebody edited later: inference goes first.
        recorded = [*proto.value_info, *proto.output]
        table = {v.name: value for v in recorded if (value := _declared(v)) is not None}
        for info in _infer(source.proto) if self._graph.body is None else ():
            value = _declared(info)
            if value is not None and _openness(value) <= _openness(table.get(info.name)):
                table[info.name] = value
        return table


def _openness(value: DeclaredValue | None) -> float:
    if value is None:
        return math.inf
    return sum(dim is None or (isinstance(dim, str) and dim.startswith("unk__")) for dim in value.shape)


def _declared(info: onnx.ValueInfoProto) -> DeclaredValue | None:
    tensor = info.type.tensor_type
    if info.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        return None
    dtype: torch.dtype | str | None = TORCH_DTYPES.get(tensor.elem_type)
    if dtype is None:
        dtype = "string" if tensor.elem_type == onnx.TensorProto.STRING else None
    if dtype is None:
        return None
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        size = dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
        dims.append(size if size is not None else dim.dim_param or None)
    return DeclaredValue(dtype, tuple(dims))


def _from_fake(value: torch.Tensor) -> DeclaredValue:
    return DeclaredValue(value.dtype, tuple(_plain(d) for d in value.shape))


def _plain(dim: Any) -> Dim:
    if isinstance(dim, int):
        return dim
    text = str(dim)
    return text if text.isidentifier() else None


def _infer(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Run ONNX's own shape inference on a copy without weight bytes."""
    twin = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    twin.graph.name = proto.graph.name
    twin.graph.output.extend(proto.graph.output)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    twin.graph.input.extend(i for i in proto.graph.input if i.name not in weights)
    for tensor in weights.values():
        _add_constant(twin.graph, tensor.name, tensor)
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            _add_constant(twin.graph, node.output[0], node.attribute[0].t)
        else:
            twin.graph.node.append(node)
    if twin.ByteSize() > _MOST_BYTES:
        return []
    # It raises on an unknown opset or a malformed node, and crashes on some; the shapes then come from elsewhere.
    # On others it never ends: a few nodes take milliseconds, and 10^5 of them seconds.
    data = isolated(
        lambda: onnx.shape_inference.infer_shapes(twin, strict_mode=False, data_prop=True).SerializeToString(),
        seconds=2 + twin.ByteSize() / 1e6,
    )
    return [] if data is None else list(onnx.ModelProto.FromString(data).graph.value_info)


def _add_constant(graph: onnx.GraphProto, name: str, tensor: onnx.TensorProto) -> None:
    if math.prod(tensor.dims) <= _SHAPE_DATA and not is_external(tensor):
        small = graph.initializer.add()
        small.CopyFrom(tensor)
        small.name = name
        return
    graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
