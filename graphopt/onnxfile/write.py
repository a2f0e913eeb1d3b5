"""Write a model: to a temporary name, then moved into place; external data is streamed, never loaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO

import onnx
from google.protobuf.message import EncodeError

from graphopt.errors import GraphOptError
from graphopt.onnxfile.read import external_span, is_external, tensors
from graphopt.onnxfile.tensor_checks import raw_bytes

# A protobuf cannot pass 2 GB; above this size the weights go to a file of their own.
EMBED_LIMIT = 1_500_000_000
# Weights in the data file start at page boundaries, so that a runtime can map each of them.
_ALIGNMENT = 4096
_SMALL = 1024
# Names under which exporters store weights. A file that a model brings along under any other name is not copied under
# it: next to the output, `conftest.py` or `.bashrc` would be run.
_DATA_SUFFIXES = frozenset({".data", ".onnx_data", ".bin", ".weights", ".pb"})


def check_output(path: str | Path) -> Path:
    """Check that `path` can be written, before any long work starts.

    Raises:
        GraphOptError: its folder is missing or read-only, or it is itself a folder, a device or a pipe.
    """
    path = Path(path)
    try:
        folder = path.parent.resolve()
        if not folder.is_dir():
            raise GraphOptError(
                f"expected an existing folder for the output, but {folder} does not exist; create it first"
            )
        if path.is_dir():
            raise GraphOptError(f"expected a file name for the output, but {path} is a folder; name a file inside it")
        if path.exists() and not path.is_file():  # it would be replaced, as a file is
            raise GraphOptError(f"expected a file name for the output, but {path} is a device; choose another")
        with suppress(FileNotFoundError):
            os.lstat(path)  # fails for names that no file can have
        # os.access answers yes to root even on read-only file systems; only trying tells.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RuntimeError) as error:  # also a name that no file can have, and links in a circle
        reason = getattr(error, "strerror", None) or error
        raise GraphOptError(
            f"expected a writable folder for the output, but {path.parent} is not ({reason}); choose another"
        ) from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it into place on success, remove it on any failure.

    Where `path` is a link, the link is replaced, and what it leads to stays as it is.

    Raises:
        GraphOptError: the disk is full, or the file cannot be written for another reason.
    """
    temporary = None
    try:
        # Not named after `path`, whose name may already be as long as a name can be.
        handle, name = tempfile.mkstemp(prefix=".graphopt-", suffix=".tmp", dir=path.parent.resolve())
        temporary = Path(name)
        os.close(handle)
        # mkstemp makes the file private; an ordinary file follows the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise GraphOptError(f"expected to write {path}, but that failed ({reason}); nothing was written") from error
    finally:
        if temporary is not None:
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
        GraphOptError: the place cannot be written, or holds the weights that are to be written.
    """
    path = check_output(path)
    target = path.parent.resolve()
    held = [t for t in tensors(proto) if is_external(t)]
    _check_apart(path, held, folder)
    outside = [] if folder is None or folder.resolve() == target else held
    sizes = [size for t in tensors(proto) if not is_external(t) and (size := raw_bytes(t)) > _SMALL]
    grown = external or (external is None and sum(sizes) > EMBED_LIMIT)
    if not outside and not grown:
        _write_proto(proto, path)
    elif not grown and folder is not None and _can_copy(outside, folder, target):
        with ExitStack() as stack:
            for location in _locations(outside):
                shutil.copyfile(folder / location, stack.enter_context(replacing(target / location)))
            _write_proto(proto, path)
    else:
        _check_apart(_data_of(path), held, folder)
        _relocate(proto, path, folder)


def _check_apart(path: Path, held: Iterable[onnx.TensorProto], folder: Path | None) -> None:
    """Refuse to write over the file from which the weights come: the graph in memory still reads it."""
    found: dict[str, tuple[Path, int]] = {}
    if any(external_span(t, folder, found).path == path.resolve() for t in held):
        raise GraphOptError(f"expected another output, since {path} holds the model's weights; choose another name")


def _write_proto(proto: onnx.ModelProto, path: Path) -> None:
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise GraphOptError(
            f"expected a model that fits into a protobuf of 2 GB, but: {error}; save it with external=True"
        ) from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _locations(held: Iterable[onnx.TensorProto]) -> list[str]:
    found = {entry.value for t in held for entry in t.external_data if entry.key == "location"}
    return sorted(found)


def _can_copy(held: list[onnx.TensorProto], folder: Path, target: Path) -> bool:
    """Whether the data files can keep their names: all are plain, none is in the way, and no weight was dropped."""
    locations = _locations(held)
    if not all(_plain(location) and not os.path.lexists(target / location) for location in locations):
        return False
    found: dict[str, tuple[Path, int]] = {}
    used = sum(external_span(t, folder, found).length or 0 for t in held)
    return used >= 0.9 * sum(size for _, size in found.values())


def _plain(location: str) -> bool:
    """Whether a name that a file chose may be given to another file of its: no script, no dot file, no folder."""
    return PurePath(location).name == location and location[0] != "." and PurePath(location).suffix in _DATA_SUFFIXES


def _data_of(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _relocate(proto: onnx.ModelProto, path: Path, folder: Path | None) -> None:
    """Stream every large tensor into one new data file and point a copy of the model to it."""
    slim = onnx.ModelProto()
    slim.CopyFrom(proto)
    data = _data_of(path)
    # Both files are complete before either takes its place.
    with replacing(data) as temporary:
        with temporary.open("wb") as stream:
            for tensor in tensors(slim):
                start = _append(tensor, stream, folder)
                if start is None:
                    continue
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.ClearField("raw_data")
                del tensor.external_data[:]
                for key, value in (("location", data.name), ("offset", start), ("length", stream.tell() - start)):
                    tensor.external_data.add(key=key, value=str(value))
        _write_proto(slim, path)


def _append(tensor: onnx.TensorProto, stream: BinaryIO, folder: Path | None) -> int | None:
    """Write a large tensor's bytes at the next page; where they start, or None for a small one."""
    if not is_external(tensor) and raw_bytes(tensor) <= _SMALL:
        return None
    start = stream.seek(_align(stream.tell()))
    if not is_external(tensor):
        stream.write(tensor.raw_data)
        return start
    span = external_span(tensor, folder)
    with span.path.open("rb") as source:
        source.seek(span.offset)
        length = span.length if span.length is not None else span.path.stat().st_size - span.offset
        _stream(source, stream, length)
    return start


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
