"""What small integer tensors hold, in symbols: the shape arithmetic that exporters write out as nodes.

The one assumption of this pass is made here: that sizes fit the integer type in which the model computes with them.
Where they do not (an axis of 2^31 elements counted in int32), the model itself computes with a wrapped size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .dims import equal, plain, product, quotient, static
from .operands import axes_of, slice_ranges

if TYPE_CHECKING:
    from .facts import View

SIZES = (torch.int64, torch.int32)
"""Types in which models compute with sizes."""
MOST = 64
"""Tensors of more elements hold no shape."""
Elements = tuple[Any, ...]


def elements_of(view: View) -> Elements | None:
    """The elements of the node's value in row-major order: integers or expressions, or booleans."""
    rule = _ELEMENTS.get(view.name)
    found = None if rule is None else rule(view)
    return found if found is not None and len(found) <= MOST else None


def _shape(view: View) -> Elements | None:
    given = view.shape(0)
    return None if given is None else given[slice(view.attribute("start", 0), view.attribute("end", None))]


def _size(view: View) -> Elements | None:
    given = view.shape(0)
    return None if given is None else (product(given),)


def _same(view: View) -> Elements | None:
    """Reshapes keep the elements in order."""
    return view.elements(0)


def _cast(view: View) -> Elements | None:
    return view.elements(0) if _integral(view) and view.attribute("to", 0) in (6, 7) else None


def _gather(view: View) -> Elements | None:
    given, index, shape = view.elements(0), view.integers(1), view.shape(0)
    if given is None or index is None or shape is None or len(shape) != 1:
        return None
    if any(not -len(given) <= i < len(given) for i in index):
        return None
    return tuple(given[i] for i in index)


def _slice(view: View) -> Elements | None:
    given, shape, ranges = view.elements(0), view.shape(0), slice_ranges(view)
    if given is None or shape is None or len(shape) != 1 or ranges is None or len(ranges) != 1:
        return None
    _, start, end, step = ranges[0]
    return given[slice(start, end, step)] if isinstance(end, int) and step > 0 else None


def _concat(view: View) -> Elements | None:
    parts = [a.elements for a in view.arguments]
    if any(a.shape is None or len(a.shape) != 1 for a in view.arguments):
        return None
    known = [p for p in parts if p is not None]
    return tuple(e for p in known for e in p) if len(known) == len(parts) else None


def _pairwise(view: View, function: Callable[[Any, Any], Any]) -> Elements | None:
    a, b = view.elements(0), view.elements(1)
    if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    # Two matrices of equally many elements could still broadcast against each other.
    if len(a) == len(b) != 1 and (view.shape(0) != view.shape(1) or not static(view.shape(0))):
        return None
    count = max(len(a), len(b)) if a and b else 0
    a, b = (x * count if len(x) == 1 else x for x in (a, b))
    found = [function(x, y) for x, y in zip(a, b, strict=False)]
    return None if any(f is None for f in found) else tuple(found)


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[View], Elements | None]:
    def rule(view: View) -> Elements | None:
        if not _integral(view) or len(view.arguments) != 2 or view.since < 7:
            return None
        return _pairwise(view, lambda a, b: plain(function(a, b)))

    return rule


def _divide(view: View) -> Elements | None:
    return _pairwise(view, quotient) if _integral(view) and view.since >= 7 else None


def _equal(view: View) -> Elements | None:
    return _pairwise(view, equal) if _integral(view) else None


def _where(view: View) -> Elements | None:
    chosen, a, b = (view.elements(i) for i in range(3))
    if chosen is None or a is None or b is None:
        return None
    shapes = {view.shape(i) for i, e in enumerate((chosen, a, b)) if len(e) != 1}
    count = max(len(chosen), len(a), len(b))
    if len(shapes) > 1 or any(len(e) not in (1, count) for e in (chosen, a, b)):
        return None
    chosen, a, b = (e * count if len(e) == 1 else e for e in (chosen, a, b))
    return tuple(x if c else y for c, x, y in zip(chosen, a, b, strict=True))


def _product(view: View) -> Elements | None:
    given = view.elements(0)
    return (product(given),) if given is not None and _over_vector(view) else None


def _sum(view: View) -> Elements | None:
    given = view.elements(0)
    return (plain(sum(given)),) if given is not None and _over_vector(view) else None


def _over_vector(view: View) -> bool:
    """Whether a reduction covers all of a vector, or a scalar."""
    shape, axes = view.shape(0), axes_of(view)
    if shape is None or len(shape) > 1 or not _integral(view):
        return False
    if axes is None:
        return not view.has(1) and not view.attribute("noop_with_empty_axes", 0)
    return len(axes) == 1


def _integral(view: View) -> bool:
    return all(a.dtype in SIZES for a in view.arguments)


def _filled(view: View) -> Elements | None:
    shape, value = view.elements(0), view.tensor_attribute("value")
    if shape is None or not static(shape) or value is None or value.dtype not in (*SIZES, torch.bool):
        return None
    count = product(shape)
    return (value.item(),) * count if 0 <= count <= MOST else None


_ELEMENTS: dict[str, Callable[[Any], Elements | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Reshape": _same,
    "Flatten": _same,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _divide,
    "Equal": _equal,
    "Where": _where,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ConstantOfShape": _filled,
}
