"""Parameters that are attributes in some opsets and inputs in others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .dims import Dim

if TYPE_CHECKING:
    from .facts import View


def axes_of(view: View, position: int = 1) -> list[int] | None:
    """The axes of the attribute or of the constant input; None where they are absent or not constant."""
    given = view.attribute("axes", None)
    if given is not None:
        return [int(a) for a in given]
    found = view.integers(position)
    return None if found is None else list(found)


def slice_ranges(view: View) -> list[tuple[int, int, Dim, int]] | None:
    """`(axis, start, end, step)` of each sliced axis; an end may be symbolic. None where another is unknown."""
    parts: list[Sequence[Any] | None]
    if view.since < 10:
        parts = [view.attribute(name, None) for name in ("starts", "ends", "axes", "steps")]
    else:
        parts = [view.integers(1), view.elements(2) or view.integers(2), view.integers(3), view.integers(4)]
    starts, ends, axes, steps = parts
    if starts is None or ends is None or any(p is None and view.has(i) for i, p in enumerate(parts, 1)):
        return None
    axes, steps = range(len(starts)) if axes is None else axes, steps or [1] * len(starts)
    if len({len(starts), len(ends), len(axes), len(steps)}) != 1:
        return None
    return [(int(a), int(b), c, int(d)) for a, b, c, d in zip(axes, starts, ends, steps, strict=True)]
