"""Rules about operators that move elements without computing: casts, reshapes, transposes, slices, concatenations."""

from __future__ import annotations

import torch
from torch import fx

from .dims import static
from .operands import axes_of, slice_ranges
from .operators import operation
from .workspace import Workspace

RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that keep all elements in row-major order and change the shape alone."""
# The float types that hold every value of a float type, infinities and NaN included.
_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
# The widest integer type, in bits, of which a float type holds every value.
_INTEGER_BITS = {torch.float16: 11, torch.float32: 24, torch.float64: 53}


def source(node: fx.Node) -> fx.Node:
    """The first operand."""
    given = node.args[0]
    assert isinstance(given, fx.Node)
    return given


def producer(node: fx.Node, *names: str) -> fx.Node | None:
    """The first operand, if it is a call of one of these operators."""
    given = node.args[0] if node.args else None
    return given if isinstance(given, fx.Node) and operation(given) in names else None


def same_shape(w: Workspace, a: fx.Node, b: fx.Node) -> bool:
    """Whether the two values have equal shapes for all inputs."""
    shape = w.shape(a)
    return shape is not None and shape == w.shape(b)


def keep_operand(w: Workspace, node: fx.Node) -> fx.Node | None:
    """For operators that return their operand whatever it is."""
    return source(node)


def only_operand(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Concat, Sum, Mean, Max, Min of one operand."""
    return source(node) if len(node.args) == 1 else None


def dropout(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Dropout's first output, where it is known to drop nothing."""
    call = node
    if operation(node) == "getitem":
        if node.args[1] != 0:
            return None
        call = source(node)
    view = w.view(call)
    if view.since < 7 and w.opset < 7 and not view.attribute("is_test", 0):
        return None
    if view.has(2):
        training, ratio = view.argument(2).value, view.argument(1).value
        idle = training is not None and not bool(training)
        if not idle and (ratio is None or float(ratio) != 0):
            return None
    return source(call)


def same_type(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Cast to the type that the operand has; not for float8, where a cast saturates infinities even then."""
    given, wanted = w.fact(source(node)).dtype, w.fact(node).dtype
    return source(node) if given is not None and given == wanted and not _is_float8(given) else None


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def holds_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if wide == narrow or narrow == torch.bool:
        return True
    if narrow.is_floating_point:
        return wide in _WIDER.get(narrow, ())
    if narrow.is_complex or wide.is_complex or wide == torch.bool:
        return False
    inner = torch.iinfo(narrow)
    if wide.is_floating_point:
        return inner.bits <= _INTEGER_BITS.get(wide, 0)
    outer = torch.iinfo(wide)
    return outer.min <= inner.min and inner.max <= outer.max


def cast_of_cast(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A cast behind one that loses nothing."""
    inner = producer(node, "Cast")
    if inner is None:
        return None
    first, middle, last = (w.fact(n).dtype for n in (source(inner), inner, node))
    if first is None or middle is None or last is None or not holds_all(middle, first):
        return None
    if last == first:
        return source(inner)
    # Out of range a cast from float to integer is undefined, and may be undefined in another way from another type.
    alike = first == torch.bool or all(t.is_floating_point == first.is_floating_point for t in (middle, last))
    special = any(_is_float8(t) or t.is_complex for t in (first, middle, last))
    return w.again(node, (source(inner), *node.args[1:])) if alike and not special else None


def no_reshape(w: Workspace, node: fx.Node) -> fx.Node | None:
    """An operator that keeps all elements in order and, for all inputs, the shape too."""
    return source(node) if same_shape(w, node, source(node)) else None


def round_trip(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Reshapes that lead back to the shape of an earlier value."""
    inner = producer(node, *RESHAPES)
    while inner is not None:
        if same_shape(w, node, source(inner)):
            return source(inner)
        inner = producer(inner, *RESHAPES)
    return None


def squeeze_of_unsqueeze(w: Workspace, node: fx.Node) -> fx.Node | None:
    """The two on the same axes, counted from the front, for values whose rank is not known."""
    inner = producer(node, "Unsqueeze" if operation(node) == "Squeeze" else "Squeeze")
    if inner is None:
        return None
    axes = [axes_of(w.view(n)) for n in (node, inner)]
    if any(not a or min(a) < 0 for a in axes) or sorted(axes[0] or ()) != sorted(axes[1] or ()):
        return None
    return source(inner)


def reshape_of_reshape(w: Workspace, node: fx.Node) -> fx.Node | None:
    """The last of several reshapes decides, unless it copies sizes (0) from the one before."""
    inner = producer(node, *RESHAPES)
    if inner is None or w.opset < 5:
        return None
    sizes = w.view(node).integers(1)
    literal = bool(node.kwargs.get("allowzero", 0))
    if sizes is None or (0 in sizes and not literal):
        return None
    while (before := producer(inner, *RESHAPES)) is not None:
        inner = before
    return w.again(node, (source(inner), *node.args[1:]))


def _order(w: Workspace, node: fx.Node, rank: int | None) -> list[int] | None:
    order = node.kwargs.get("perm")
    if order is not None:
        return [int(a) for a in order]  # type: ignore[union-attr, arg-type]  # a list of integers
    return None if rank is None else list(range(rank))[::-1]


def _rank(w: Workspace, node: fx.Node) -> int | None:
    shape, order = w.shape(source(node)), node.kwargs.get("perm")
    if isinstance(order, (list, tuple)):
        return len(order)
    return None if shape is None else len(shape)


def no_transpose(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A permutation that leaves every axis in place."""
    order = _order(w, node, _rank(w, node))
    return source(node) if order is not None and order == sorted(order) else None


def transpose_of_transpose(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Two permutations are one, or none at all."""
    inner = producer(node, "Transpose")
    if inner is None:
        return None
    rank = _rank(w, node) or _rank(w, inner)
    outer_order, inner_order = _order(w, node, rank), _order(w, inner, rank)
    if outer_order is None or inner_order is None:
        both = "perm" not in node.kwargs and "perm" not in inner.kwargs
        return source(inner) if both else None
    joint = [inner_order[a] for a in outer_order]
    return source(inner) if joint == sorted(joint) else w.call(node, "Transpose", (source(inner),), perm=joint)


def no_tile(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Repeating each axis once."""
    repeats = w.view(node).integers(1)
    return source(node) if repeats is not None and all(r == 1 for r in repeats) else None


def no_pad(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Padding by nothing."""
    view = w.view(node)
    pads = view.integers(1) if view.since >= 11 else view.attribute("pads", view.attribute("paddings", None))
    return source(node) if pads is not None and not any(pads) else None


def no_slice(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A contiguous range as long as the axis is the whole axis."""
    ranges = slice_ranges(w.view(node))
    forward = ranges is not None and all(step == 1 for *_, step in ranges)
    return source(node) if forward and same_shape(w, node, source(node)) else None


def slice_of_concat(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A range that lies within one part of a concatenation."""
    joined, ranges = producer(node, "Concat"), slice_ranges(w.view(node))
    if joined is None or ranges is None or len(ranges) != 1:
        return None
    axis, start, end, step = ranges[0]
    shape = w.shape(joined)
    if shape is None or step != 1 or not isinstance(end, int):
        return None
    along = int(joined.kwargs.get("axis", 1)) % len(shape)  # type: ignore[arg-type]  # an integer attribute
    sizes = [s[along] for a in joined.args if (s := w.shape(a)) is not None]
    if axis % len(shape) != along or len(sizes) != len(joined.args) or not static(sizes):
        return None
    first, last, _ = slice(start, end).indices(sum(sizes))
    offset = 0
    for part, size in zip(joined.args, sizes, strict=True):
        if offset <= first < last <= offset + size:
            assert isinstance(part, fx.Node)
            return part if last - first == size else _narrowed(w, node, part, along, first - offset, last - offset)
        offset += size
    return None


def _narrowed(w: Workspace, node: fx.Node, part: fx.Node, axis: int, start: int, end: int) -> fx.Node:
    if w.opset < 10:
        return w.call(node, "Slice", (part,), starts=[start], ends=[end], axes=[axis])
    bounds = [w.integers(node, [value]) for value in (start, end, axis)]
    return w.call(node, "Slice", (part, *bounds))
