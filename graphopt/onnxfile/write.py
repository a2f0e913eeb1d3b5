"""Write a model: to a temporary name, then moved into place; external data is streamed, never loaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx

from graphopt.errors import GraphOptError
from graphopt.onnxfile.read import external_span, is_external, tensors

# A protobuf cannot pass 2 GB; above this size the weights go to a file of their own.
EMBED_LIMIT = 1_500_000_000
# Weights in the data file start at page boundaries, so that a runtime can map each of them.
_ALIGNMENT = 4096
_SMALL = 1024


def check_output(path: str | Path) -> Path:
    """Check that `path` can be written, before any long work starts.

    Raises:
        GraphOptError: its folder is missing or read-only, or it is itself a folder.
    """
    path = Path(path)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise GraphOptError(f"expected an existing folder for the output, but {folder} does not exist; create it first")
    if path.is_dir():
        raise GraphOptError(f"expected a file name for the output, but {path} is a folder; name a file inside it")
    try:
        # os.access answers yes to root even on read-only file systems; only trying tells.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GraphOptError(
            f"expected a writable folder for the output, but {folder} is not ({error.strerror}); choose another"
        ) from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it into place on success, remove it on any failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.resolve().parent)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes the file private; an ordinary file follows the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(
    proto: onnx.ModelProto, path: str | Path, *, folder: Path | None = None, external: bool | None = None
) -> None:
    """Write `proto` to `path`.

    Args:
        proto: the model; not modified.
        path: where to.
        folder: where its existing external data lies.
        external: put all weights into `<path>.data`; None means only where the protobuf would pass 1.5 GB.

    Raises:
        GraphOptError: the place cannot be written.
    """
    path = check_output(path)
    held = [t for t in tensors(proto) if is_external(t)]
    outside = [] if folder is None or folder.resolve() == path.resolve().parent else held
    inside = [t for t in tensors(proto) if not is_external(t) and len(t.raw_data) > _SMALL]
    grown = external or (external is None and sum(len(t.raw_data) for t in inside) > EMBED_LIMIT)
    if not outside and not grown:
        _write_proto(proto, path)
        return
    if not grown and folder is not None and _can_copy(outside, folder, path.resolve().parent):
        _copy_files(outside, folder, path.resolve().parent)
        _write_proto(proto, path)
        return
    _relocate(proto, path, folder)


def _write_proto(proto: onnx.ModelProto, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())


def _locations(held: Iterable[onnx.TensorProto]) -> list[str]:
    found = {entry.value for t in held for entry in t.external_data if entry.key == "location"}
    return sorted(found)


def _can_copy(held: list[onnx.TensorProto], folder: Path, target: Path) -> bool:
    """Whether the data files can keep their names: none is in the way, and no dropped weight wastes space."""
    locations = _locations(held)
    if any((target / location).exists() for location in locations):
        return False
    used = sum(external_span(t, folder).length or 0 for t in held)
    stored = sum((folder / location).stat().st_size for location in locations)
    return used >= 0.9 * stored


def _copy_files(held: list[onnx.TensorProto], folder: Path, target: Path) -> None:
    for location in _locations(held):
        destination = target / location
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replacing(destination) as temporary:
            shutil.copyfile(folder / location, temporary)


def _relocate(proto: onnx.ModelProto, path: Path, folder: Path | None) -> None:
    """Stream every large tensor into one new data file and point a copy of the model to it."""
    slim = onnx.ModelProto()
    slim.CopyFrom(proto)
    data = path.with_name(path.name + ".data")
    with replacing(data) as temporary, temporary.open("wb") as stream:
        for tensor in tensors(slim):
            if is_external(tensor):
                span = external_span(tensor, folder)
                offset = _align(stream.tell())
                stream.seek(offset)
                with span.path.open("rb") as source:
                    source.seek(span.offset)
                    length = span.length if span.length is not None else span.path.stat().st_size - span.offset
                    _stream(source, stream, length)
            elif len(tensor.raw_data) > _SMALL:
                offset, length = _align(stream.tell()), len(tensor.raw_data)
                stream.seek(offset)
                stream.write(tensor.raw_data)
                tensor.ClearField("raw_data")
            else:
                continue
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    _write_proto(slim, path)


def _align(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _stream(source: BinaryIO, target: BinaryIO, length: int, chunk: int = 1 << 24) -> None:
    remaining = length
    while remaining:
        block = source.read(min(chunk, remaining))
        if not block:
            raise GraphOptError("external data ended before its tensor did; the file changed while it was read")
        target.write(block)
        remaining -= len(block)
