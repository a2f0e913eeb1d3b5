"""Read an .onnx file into its protobuf, without touching external weights.

The protobuf itself stays the source of truth. It is the only representation that keeps everything (sparse
initialisers, map types, redeclared names, training info), and it is small whenever the weights are external.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from graphopt.errors import GraphOptError


@dataclass(frozen=True)
class OnnxFile:
    """A parsed model and the folder that its external data must lie in (None for a model made in memory)."""

    proto: onnx.ModelProto
    path: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The model's directory."""
        return None if self.path is None else self.path.parent

    def opset(self, domain: str = "") -> int:
        """The opset version that the model imports for `domain`, or 1 where it imports none."""
        wanted = _domain(domain)
        return next((o.version for o in self.proto.opset_import if _domain(o.domain) == wanted), 1)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def read(path: str | Path) -> OnnxFile:
    """Parse `path` and check that its external data is there, inside its folder, and long enough.

    Raises:
        GraphOptError: the file is missing, is not an ONNX model, or points outside its folder.
    """
    path = Path(path)
    if not path.exists():
        raise GraphOptError(f"expected a model file, but {path} does not exist; check the path")
    if path.is_dir():
        raise GraphOptError(f"expected an .onnx file, but {path} is a folder; name the file inside it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GraphOptError(f"expected a readable model file, but {path} cannot be read: {error.strerror}") from error
    model = OnnxFile(parse(data, str(path)), path.resolve())
    _check_external(model)
    return model


def parse(data: bytes, name: str = "the model") -> onnx.ModelProto:
    """Parse the bytes of an ONNX model.

    Raises:
        GraphOptError: the bytes are empty, truncated, or some other format.
    """
    if not data:
        raise GraphOptError(f"expected an ONNX model, but {name} is empty; export or download it again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise GraphOptError(
            f"expected an ONNX protobuf, but {name} ({len(data)} bytes) does not parse as one: "
            "it is truncated or another format; export or download it again"
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise GraphOptError(
            f"expected an ONNX model, but {name} parses without a graph or an IR version; "
            "is it an ONNX model file at all?"
        )
    return proto


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, functions' included."""
    yield from _graphs_in(proto.graph)
    for function in proto.functions:
        yield from _subgraphs(function.node)


def _graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    yield from _subgraphs(graph.node)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs_in(attribute.g)
            for graph in attribute.graphs:
                yield from _graphs_in(graph)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model that can carry external data."""
    for graph in graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        for node in graph.node:
            yield from _attribute_tensors(node)
    for function in proto.functions:
        for node in function.node:
            yield from _attribute_tensors(node)


def _attribute_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


@dataclass(frozen=True)
class ExternalSpan:
    """Where an external tensor's bytes lie."""

    path: Path
    offset: int
    length: int | None


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def external_span(tensor: onnx.TensorProto, folder: Path | None) -> ExternalSpan:
    """Resolve an external tensor to a file span, refusing every path that leaves the model's folder.

    Raises:
        GraphOptError: the location is absolute, leaves the folder (also through a link), or the span is
            past the end of the file.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise GraphOptError(
            f"tensor {tensor.name!r} has external data at {location!r}, but the model has no folder; "
            "load it from its file"
        )
    root = folder.resolve()
    path = (root / location).resolve()
    if not location or Path(location).is_absolute() or root not in path.parents:
        raise GraphOptError(
            f"expected external data inside the model's folder, but tensor {tensor.name!r} points to {location!r}; "
            "refusing to read it"
        )
    if not path.is_file():
        raise GraphOptError(
            f"expected the external data file {location!r} beside the model, but it is not in {root}; "
            "copy it there together with the .onnx file"
        )
    try:
        offset = int(entries.get("offset", 0) or 0)
        length = int(entries["length"]) if entries.get("length") else None
    except ValueError as error:
        raise GraphOptError(f"tensor {tensor.name!r} has an external offset or length that is no number") from error
    size = path.stat().st_size
    if offset < 0 or (length or 0) < 0 or offset + (length or 0) > size:
        raise GraphOptError(
            f"expected {offset + (length or 0)} bytes in {location!r} for tensor {tensor.name!r}, "
            f"but the file has {size}; it is truncated or belongs to another model"
        )
    return ExternalSpan(path, offset, length)


def _check_external(model: OnnxFile) -> None:
    for tensor in tensors(model.proto):
        if is_external(tensor):
            external_span(tensor, model.folder)
