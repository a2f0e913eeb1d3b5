"""Read an .onnx file into its protobuf, without touching external weights.

The protobuf itself stays the source of truth. It is the only representation that keeps everything (sparse
initialisers, map types, redeclared names, training info), and it is small whenever the weights are external.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from graphopt.errors import GraphOptError
from graphopt.onnxfile.checks import check_model
from graphopt.onnxfile.tensor_checks import tensors_in

# No protobuf is larger, and a file that claims to be one is not worth reading.
_MOST_BYTES = (1 << 31) - 1
# No system opens a longer one, and taking it apart takes a time that grows with its square.
_LONGEST_PATH = 4096


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
    try:
        data = _content(path)
    except (OSError, ValueError) as error:  # also a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise GraphOptError(f"expected a readable model file, but {path} cannot be read: {reason}") from error
    model = OnnxFile(parse(data, str(path)), path.resolve())
    _check_external(model)
    return model


def _content(path: Path) -> bytes:
    status = path.stat() if os.path.lexists(path) else None
    if status is None:
        raise GraphOptError(f"expected a model file, but {path} does not exist; check the path")
    if stat.S_ISDIR(status.st_mode):
        raise GraphOptError(f"expected an .onnx file, but {path} is a folder; name the file inside it")
    if not stat.S_ISREG(status.st_mode):  # its content may never end
        raise GraphOptError(f"expected a regular file, but {path} is a device or a pipe; copy its content to a file")
    if status.st_size > _MOST_BYTES:
        raise GraphOptError(
            f"expected a protobuf of at most 2 GB, but {path} has {status.st_size} bytes; "
            "export the model with external data, and name the small .onnx file"
        )
    return path.read_bytes()


def parse(data: bytes, name: str = "the model") -> onnx.ModelProto:
    """Parse the bytes of an ONNX model.

    Raises:
        GraphOptError: the bytes are empty, truncated, some other format, or have not the structure of a model.
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
    check_model(proto)
    return proto


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, those of functions and of training included."""
    yield from _graphs_in(proto.graph)
    for training in proto.training_info:
        yield from _graphs_in(training.initialization)
        yield from _graphs_in(training.algorithm)
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
            for attribute in node.attribute:
                yield from tensors_in(attribute)
    for function in proto.functions:
        for attribute in (*function.attribute_proto, *(a for node in function.node for a in node.attribute)):
            yield from tensors_in(attribute)


@dataclass(frozen=True)
class ExternalSpan:
    """Where an external tensor's bytes lie."""

    path: Path
    offset: int
    length: int | None


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def external_span(
    tensor: onnx.TensorProto, folder: Path | None, found: dict[str, tuple[Path, int]] | None = None
) -> ExternalSpan:
    """Resolve an external tensor to a file span, refusing every path that leaves the model's folder.

    Args:
        tensor: the tensor.
        folder: the model's folder.
        found: path and size by location; whoever asks for many tensors of one file passes the same dict each time.

    Raises:
        GraphOptError: the location is absolute, leaves the folder (also through a link), or the span is
            past the end of the file.
    """
    label = f"tensor {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if len(entries) < len(tensor.external_data) or not all(isinstance(v, str) for v in entries.values()):
        raise GraphOptError(f"the external data of {label} is described twice, or not in UTF-8; the file is corrupt")
    if folder is None:
        raise GraphOptError(
            f"{label} has external data at {location!r}, but the model has no folder; load it from its file"
        )
    found = {} if found is None else found
    if location not in found:
        found[location] = _located(location, folder.resolve(), label)
    path, size = found[location]
    offset, length = (_number(entries.get(key, ""), label) for key in ("offset", "length"))
    end = (offset or 0) + (length or 0)
    if (offset or 0) < 0 or (length or 0) < 0 or end > size:
        raise GraphOptError(
            f"expected {end} bytes in {location!r} for {label}, "
            f"but the file has {size}; it is truncated or belongs to another model"
        )
    return ExternalSpan(path, offset or 0, length)


def _located(location: str, root: Path, label: str) -> tuple[Path, int]:
    """The file at a location and its size."""
    if len(location) > _LONGEST_PATH:
        raise GraphOptError(f"expected a file name in the external data of {label}, found {len(location)} letters")
    try:
        path = (root / location).resolve()
        if not location or Path(location).is_absolute() or root not in path.parents:
            raise GraphOptError(
                f"expected external data inside the model's folder, but {label} points to {_cut(location)!r}; "
                "refusing to read it"
            )
        if path.is_file():
            return path, path.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, or links in a circle
        raise GraphOptError(
            f"expected a file name in the external data of {label}, found {_cut(location)!r}: {error}"
        ) from error
    raise GraphOptError(
        f"expected the external data file {_cut(location)!r} beside the model, but it is not in {root}; "
        "copy it there together with the .onnx file"
    )


def _number(text: str, label: str) -> int | None:
    if not text:
        return None
    # Python would read "1_0" and digits of every script, which other readers of the file do not.
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise GraphOptError(f"{label} has an external offset or length that is no number; the file is corrupt")
    return int(text)


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_external(model: OnnxFile) -> None:
    found: dict[str, tuple[Path, int]] = {}
    for tensor in tensors(model.proto):
        if is_external(tensor) and external_span(tensor, model.folder, found).path == model.path:
            raise GraphOptError(
                f"tensor {tensor.name!r} has the model file itself for its external data; saving the model would "
                "destroy it"
            )
