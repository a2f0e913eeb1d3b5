"""What is done with each input: everything but a GraphOptError, from anything on the way, is an escape."""

from __future__ import annotations

import math
import resource
from pathlib import Path

from graphopt.backends.onnx import to_proto
from graphopt.errors import CheckFailed, GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile, parse

# What a small model may take beyond the libraries.
MEMORY = 2 << 30
_LONGEST = 1500
_MOST_ELEMENTS = 1 << 14


class EscapeError(Exception):
    """A result that breaks a promise without an exception."""


def load(data: bytes) -> None:
    """Parse, check, import, emit, serialise, and parse once more; an unchanged model comes back as it was.

    Raises:
        GraphOptError: the bytes are no model.
        EscapeError: the model came back changed.
    """
    proto = parse(data)
    saved = to_proto(load_onnx(OnnxFile(proto))).SerializeToString(deterministic=True)
    # Not by ==, to which NaN differs from itself.
    if saved != proto.SerializeToString(deterministic=True):
        raise EscapeError("load and save changed the model")
    parse(saved)


def clean(data: bytes) -> None:
    """Load, clean up, which runs the model before and after on small made-up inputs, and emit the result.

    Raises:
        GraphOptError: the bytes are no model, or one that cannot run.
        EscapeError: the model was cleaned up wrongly.
    """
    graph = load_onnx(OnnxFile(parse(data)))
    if any(math.prod(d for d in spec.shape or () if isinstance(d, int)) > _MOST_ELEMENTS for spec in graph.inputs):
        return  # made-up inputs have the declared sizes: running such a model takes long for an honest reason
    try:
        result = graph.apply("cleanup")
    except CheckFailed as error:
        raise EscapeError(f"cleanup changed what the model computes: {error}") from error
    parse(to_proto(result.graph).SerializeToString())


TARGETS = {"load": load, "clean": clean}


def verdict(target: str, data: bytes) -> Exception | None:
    """What escaped from a target, or None.

    Args:
        target: its name.
        data: the input.
    """
    try:
        TARGETS[target](data)
    except GraphOptError as error:
        text = str(error)
        if "\n" in text or len(text) > _LONGEST:
            return EscapeError(f"an error is no sentence: {text[:200]!r}")
    except Exception as error:
        return error
    return None


def limit_memory() -> None:
    """Let this process take `MEMORY` more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
