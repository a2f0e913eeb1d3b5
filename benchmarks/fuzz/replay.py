"""Run one input once more, and show it: `python -m benchmarks.fuzz.replay TARGET FILE [--smaller]`."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

from benchmarks.fuzz import targets


def smaller(data: bytes, same: Callable[[bytes], bool]) -> bytes:
    """The input without all the parts that may go; it stays the same kind of escape.

    Args:
        data: a serialised model.
        same: whether an input still escapes in the same way.
    """
    index = 0
    while True:
        model = onnx.ModelProto.FromString(data)
        parts = _parts(model)
        if index >= len(parts):
            return data
        parts[index]()
        shorter = model.SerializeToString()
        if same(shorter):
            data = shorter
        else:
            index += 1


def _parts(message: Any) -> list[Callable[[], None]]:
    """What can be taken out of a message, large parts first."""
    found: list[Callable[[], None]] = []
    inner: list[Callable[[], None]] = []
    for descriptor, value in message.ListFields():
        if descriptor.is_repeated:
            for i in range(len(value)):
                found.append(lambda value=value, i=i: value.__delitem__(i))  # type: ignore[misc]  # mypy infers no lambda with defaults
        else:
            found.append(lambda name=descriptor.name: message.ClearField(name))  # type: ignore[misc]  # mypy infers no lambda with defaults
        if descriptor.type == Field.TYPE_MESSAGE:
            for part in value if descriptor.is_repeated else [value]:
                inner += _parts(part)
    return found + inner


def main() -> None:
    """See the module."""
    target, path = sys.argv[1], Path(sys.argv[2])
    data = path.read_bytes()
    warnings.simplefilter("ignore")
    targets.limit_memory()
    escaped = targets.verdict(target, data)
    if escaped is not None and "--smaller" in sys.argv:
        data = smaller(data, lambda changed: _alike(targets.verdict(target, changed), escaped))
        path.write_bytes(data)
    try:
        print(onnx.printer.to_text(onnx.ModelProto.FromString(data)))
    except Exception as error:  # it may be no model at all
        print(f"{len(data)} bytes without a text form: {error}")
    if escaped is None:
        print("nothing escapes")
    else:
        traceback.print_exception(escaped)


def _alike(a: Exception | None, b: Exception) -> bool:
    def place(error: Exception) -> list[tuple[str, int]]:
        return [(f.name, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)[-1:]]

    return a is not None and type(a) is type(b) and (place(a) == place(b))


if __name__ == "__main__":
    main()
