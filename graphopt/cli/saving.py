"""Writing a rewritten model: under a temporary name, run on onnxruntime, and only then moved into place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.runtime import Runtime, differences, feeds_of, installed
from graphopt.errors import CheckFailed, GraphOptError

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.onnxfile import OnnxFile
    from graphopt.rewrite.report import OutputDifference

# torch and onnxruntime sum in another order: fp32 leaves about 1e-6, and a deep model ten times that.
_LIMIT = 1e-4
# Where the unchanged model already differs more (fp16, random operators), the rewritten one may differ alike.
_ALLOWANCE = 4.0


def default_output(model: Path, names: Sequence[str], target: str) -> Path:
    """`model.linearize.onnx` for `model.onnx`: named after the passes, without cleanup unless it is alone."""
    telling = [name for name in dict.fromkeys(names) if name != "cleanup"] or ["cleanup"]
    suffix = ".pt2" if target == "torch" else ".onnx"
    return model.with_name(f"{model.stem}.{'-'.join(telling)}{suffix}")


def check_paths(model: Path, out: Path, *, force: bool) -> None:
    """Check that `out` can be written and overwrites nothing by accident.

    Raises:
        GraphOptError: it is the input, it exists and `force` is not given, or it cannot be written.
    """
    from graphopt.onnxfile.write import check_output

    if out.exists() and model.exists() and out.samefile(model):
        raise GraphOptError(f"expected another file for the output than the input {model}; choose one with -o")
    check_output(out)
    if out.exists() and not out.is_file():
        raise GraphOptError(f"expected a regular file for the output, but {out} is none; choose another with -o")
    if out.exists() and not force:
        raise GraphOptError(
            f"expected a new file for the output, but {out} exists; choose another with -o or give --force"
        )


def check_data(source: OnnxFile | None, out: Path, *, external: bool, force: bool) -> None:
    """Check that neither `out` nor its data file takes the place of weights that something else uses.

    Raises:
        GraphOptError: one of them holds the input's weights, or exists and `force` is not given.
    """
    held = _held(source)
    for path in (out, data_of(out)):
        if path.resolve() in held:
            raise GraphOptError(f"expected another output, since {path} holds the input's weights; choose one with -o")
    if external and data_of(out).exists() and not force:
        raise GraphOptError(
            f"expected a new file for the weights, but {data_of(out)} exists; choose another with -o or give --force"
        )


def data_of(path: Path) -> Path:
    """Where the external weights of the model at `path` go."""
    return path.with_name(path.name + ".data")


def _held(source: OnnxFile | None) -> set[Path]:
    """The files that the input's external weights lie in."""
    from graphopt.onnxfile.read import external_span, is_external, tensors

    if source is None:
        return set()
    return {external_span(t, source.folder).path for t in tensors(source.proto) if is_external(t)}


@dataclass(frozen=True)
class Check:
    """What running the written file on onnxruntime showed; `note` says why where it could not be run."""

    outputs: Sequence[OutputDifference] = ()
    note: str = ""


def save_checked(
    graph: Graph,
    out: Path,
    values: Sequence[Any],
    *,
    target: str = "onnx",
    external: bool = False,
    force: bool = False,
) -> Check:
    """Write `graph` to `out`, unless the written file computes something else.

    Args:
        graph: what to write.
        out: where to.
        values: one batch of inputs to run the file on.
        target: the backend that writes it.
        external: put the weights into a file of their own.
        force: overwrite existing files.

    Raises:
        CheckFailed: the file's outputs differ from the graph's; nothing is left behind.
        GraphOptError: the backend cannot write the graph.
    """
    options: dict[str, Any] = {"external": True} if external else {}
    with _staging(graph, out) as temporary:
        graph.save(temporary, target=target, **options)
        check = _check(graph, temporary, values) if out.suffix == ".onnx" else Check()
        _move(temporary, out, force=force)
    return check


@contextlib.contextmanager
def _staging(graph: Graph, out: Path) -> Iterator[Path]:
    """A temporary name in the folder of `out`; whatever saving leaves there on a failure is removed.

    It has to be that folder: a model finds its external weights relative to itself.
    """
    folder = out.resolve().parent
    handle, name = tempfile.mkstemp(prefix=f".{out.stem}.", suffix=out.suffix, dir=folder)
    os.close(handle)
    temporary = Path(name)
    # The input's own weight files are copied here where the output goes to another folder.
    source = graph.onnx.folder if graph.onnx is not None else None
    copies = {folder / path.relative_to(source) for path in _held(graph.onnx)} if source is not None else set()
    copies = {path for path in copies if not path.exists()}
    try:
        yield temporary
    except BaseException:
        for path in copies:
            path.unlink(missing_ok=True)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        data_of(temporary).unlink(missing_ok=True)


def _move(temporary: Path, out: Path, *, force: bool) -> None:
    data = data_of(temporary)
    if data.exists():
        if data_of(out).exists() and not force:
            raise GraphOptError(f"expected a new file for the weights, but {data_of(out)} exists; give --force")
        _point_to(temporary, data.name, data_of(out).name)
        os.replace(data, data_of(out))
    os.replace(temporary, out)


def _point_to(model: Path, old: str, new: str) -> None:
    """Let external weights at `old` be found at `new`."""
    from graphopt.onnxfile.read import is_external, parse, tensors

    proto = parse(model.read_bytes(), str(model))
    for tensor in tensors(proto):
        for entry in tensor.external_data if is_external(tensor) else ():
            if entry.key == "location" and entry.value == old:
                entry.value = new
    model.write_bytes(proto.SerializeToString())


def _check(graph: Graph, path: Path, values: Sequence[Any]) -> Check:
    if not installed():
        return Check(note="the written file was not run, because onnxruntime is not installed; install graphopt[cpu]")
    try:
        outputs = _against_runtime(graph, path, values)
    except GraphOptError as error:
        reason = str(error).replace(str(path), "the written file")
        if _original(graph, values) is not None:
            raise CheckFailed(f"{reason}; the original runs there, so nothing was written") from error
        return Check(note=f"the written file was not checked: onnxruntime runs neither it nor the original ({reason})")
    far = [o for o in outputs if not o.rel_rms <= _LIMIT]
    if not far:
        return Check(outputs)
    own = {o.name: o.rel_rms for o in _original(graph, values) or ()}
    for output in far:
        # Both are infinite where one runtime alone gives NaN: nothing to hold against the rewrite.
        if not output.rel_rms <= _ALLOWANCE * own.get(output.name, 0.0):
            raise CheckFailed(
                "expected the written file to compute what the rewritten graph does, but on onnxruntime "
                f"output {output.name!r} differs by a relative RMS of {output.rel_rms:.3g} "
                f"(limit {_LIMIT:g}); nothing was written"
            )
    worst = max(far, key=lambda o: o.rel_rms)
    text = f"onnxruntime and torch differ by a relative RMS of {worst.rel_rms:.3g} at output {worst.name!r}"
    return Check(outputs, f"{text}, and by {own[worst.name]:.3g} in the original")


def _original(graph: Graph, values: Sequence[Any]) -> Sequence[OutputDifference] | None:
    """How far torch and onnxruntime are apart on the model as it was; None where it does not run."""
    from graphopt.frontends.onnx import load_onnx

    if graph.onnx is None or graph.onnx.path is None:
        return None
    try:
        return _against_runtime(load_onnx(graph.onnx), graph.onnx.path, values)
    except GraphOptError:
        return None


def _against_runtime(graph: Graph, path: Path, values: Sequence[Any]) -> Sequence[OutputDifference]:
    runtime = Runtime(path)
    feeds = feeds_of([spec.name for spec in graph.inputs], values)
    names = [spec.name for spec in graph.outputs]
    expected = graph.run(feeds)
    found = runtime.run(names, feeds)
    return differences(names, [[expected[name] for name in names]], [found])


def file_facts(path: Path) -> dict[str, Any]:
    """Path, hash, size and opset of a model file, for the report."""
    from graphopt.onnxfile import read

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    facts: dict[str, Any] = {"path": str(path), "sha256": digest, "bytes": path.stat().st_size, "opset": None}
    if path.suffix == ".onnx":
        file = read(path)
        facts["external_bytes"] = sum(held.stat().st_size for held in _held(file))
        facts["opset"] = file.opset()
    return facts
