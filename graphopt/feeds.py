"""What a caller may feed for an input, and the form in which it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import GraphOptError
from graphopt.onnxfile.packed import CARRIERS
from graphopt.onnxfile.tensors import ONNX_DTYPES, element_type, element_type_of, from_numpy, to_numpy, type_name

if TYPE_CHECKING:
    from graphopt.graph import ValueSpec

_KINDS: dict[type, str] = {list: "a list", tuple: "a list", dict: "a map", type(None): "nothing"}


def from_feed(value: Any) -> Any:
    """The form in which a fed value runs: arrays as tensors, lists element by element, all else as it is."""
    if isinstance(value, (list, tuple)):
        return [from_feed(v) for v in value]
    return from_numpy(value) if isinstance(value, (np.ndarray, np.generic)) else value


def check_value(spec: ValueSpec, value: Any) -> None:
    """Check a fed value against the declared type, rank and static sizes.

    A type of fewer than 8 bits may also come in the wider one that carries it.

    Raises:
        GraphOptError: naming what was expected and what was given.
    """
    kind = _KINDS.get(type(value), "an array")
    if kind not in _allowed(spec):
        raise GraphOptError(f"expected input {spec}, but {kind} was given")
    shape = getattr(value, "shape", None)
    if shape is None:
        return
    wanted, found = element_type(spec.dtype), element_type_of(value)
    carried = wanted in CARRIERS and found == ONNX_DTYPES[CARRIERS[wanted]]
    if wanted and found not in (0, wanted) and not carried:
        raise GraphOptError(f"expected input {spec}, but the given array is {type_name(found)}")
    if carried and isinstance(value, np.ndarray) and not _holds(value, wanted):
        raise GraphOptError(f"expected input {spec}, but the given array has values outside of {type_name(wanted)}")
    if spec.shape is not None and not _fits(spec.shape, shape):
        raise GraphOptError(f"expected input {spec}, but the given array has shape {list(shape)}")


def _allowed(spec: ValueSpec) -> tuple[str, ...]:
    """The kinds of values that the declaration admits; numbers, as a torch model takes them, count as arrays."""
    declared = str(spec.dtype)
    if spec.dtype is None or declared.startswith("opt"):
        return ("an array", "a list", "a map", "nothing")
    if declared.startswith("seq"):
        return ("a list",)
    return ("a map",) if declared.startswith("map") else ("an array",)


def _holds(array: np.ndarray[Any, Any], elem_type: int) -> bool:
    """Whether every value of a carrier is one of the type that it carries."""
    carrier = from_numpy(array)
    back = np.asarray(to_numpy(carrier, elem_type)).astype(array.dtype)
    return array.tobytes() == back.tobytes()


def _fits(wanted: tuple[int | str | None, ...], found: Any) -> bool:
    return len(wanted) == len(found) and all(
        not isinstance(want, int) or int(got) == want for want, got in zip(wanted, found, strict=True)
    )
