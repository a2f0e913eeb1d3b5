"""Shapes of ONNX operators, from those of their operands: only what holds for every input.

`graphopt.shapes` expresses shapes for sizes of two and more; a rewrite that is exact needs them for 0 and 1 as
well, and may trust no recorded value_info. What this table does not know it calls a new symbol, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .dims import Dim, Shape, broadcast, equal, plain, product, quotient, static
from .operands import axes_of, slice_ranges
from .operators import words

if TYPE_CHECKING:
    from .facts import View

_END = 2**31 - 1
"""From this end on a slice reaches the end of any axis, as the ONNX standard recommends to spell it."""

UNARY = words(
    "Identity Dropout Relu LeakyRelu Elu Selu Celu ThresholdedRelu HardSigmoid HardSwish Sigmoid Tanh "
    "Softplus Softsign Mish Gelu Erf Exp Log Sqrt Reciprocal Abs Neg Sign Floor Ceil Round Sin Cos Tan "
    "Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Not IsNaN IsInf Cast CastLike Clip Softmax LogSoftmax "
    "Hardmax LayerNormalization RMSNormalization BatchNormalization InstanceNormalization "
    "GroupNormalization LpNormalization MeanVarianceNormalization LRN CumSum PRelu Trilu ScatterND "
    "ScatterElements Scatter QuantizeLinear DequantizeLinear BitwiseNot"
)
"""Operators whose (first) output has the shape of their first operand."""
BINARY = words(
    "Add Sub Mul Div Pow Mod Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor Where Sum Mean "
    "Max Min BitwiseAnd BitwiseOr BitwiseXor BitShift"
)


def shape_of(view: View) -> Shape | None:
    """The shape of the first output."""
    if view.name in UNARY:
        return view.shape(0)
    if view.name in BINARY:
        # Before opset 7 the second operand was aligned by attributes, and the first gave the shape.
        early = view.since < 7 and view.name not in ("Where", "Sum", "Mean", "Max", "Min")
        return view.shape(0) if early else broadcast([a.shape for a in view.arguments], view.atom)
    if view.name.startswith("Reduce") or view.name in ("ArgMax", "ArgMin"):
        return _reduced(view)
    rule = _SHAPES.get(view.name)
    return None if rule is None else rule(view)


def _reshape(view: View) -> Shape | None:
    given, wanted = view.shape(0), view.elements(1)
    if view.since < 5:
        wanted = tuple(view.attribute("shape", ()))
    if wanted is None:
        length = view.shape(1)
        return tuple(map(view.atom, range(length[0]))) if length and isinstance(length[0], int) else None
    literal = bool(view.attribute("allowzero", 0))
    dims = [_wanted(view, i, size, given, literal) for i, size in enumerate(wanted)]
    if -1 in wanted:
        hole = list(wanted).index(-1)
        rest = product(d for i, d in enumerate(dims) if i != hole)
        found = None if given is None else quotient(product(given), rest)
        dims[hole] = view.atom(hole) if found is None else found
    return tuple(dims)


def _wanted(view: View, axis: int, size: Dim, given: Shape | None, literal: bool) -> Dim:
    """One size of a reshape: 0 copies the operand's, and so does a computed size whenever it happens to be 0."""
    if isinstance(size, int):
        if size != 0 or literal:
            return size
        return given[axis] if given is not None and axis < len(given) else view.atom(axis)
    # A multiple of the size is 0 together with it.
    harmless = given is not None and axis < len(given) and quotient(given[axis], size) is not None
    return size if harmless or size.is_positive else view.atom(axis)


def _reduced(view: View) -> Shape | None:
    given = view.shape(0)
    if given is None:
        return None
    if view.name in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [int(view.attribute("axis", 0))]
    else:
        axes = axes_of(view)
        if axes is None and view.has(1):
            return None
        if not axes:
            axes = [] if view.attribute("noop_with_empty_axes", 0) else list(range(len(given)))
    chosen = {a % len(given) for a in axes or ()} if given else set()
    if view.attribute("keepdims", 1):
        return tuple(1 if i in chosen else d for i, d in enumerate(given))
    return tuple(d for i, d in enumerate(given) if i not in chosen)


def _transpose(view: View) -> Shape | None:
    given = view.shape(0)
    if given is None:
        return None
    order = view.attribute("perm", None)
    return tuple(given[int(a)] for a in order) if order is not None else given[::-1]


def _flatten(view: View) -> Shape | None:
    given, axis = view.shape(0), int(view.attribute("axis", 1))
    return None if given is None else (product(given[:axis]), product(given[axis:]))


def _unsqueeze(view: View) -> Shape | None:
    given, axes = view.shape(0), axes_of(view)
    if given is None or axes is None:
        return None
    rank = len(given) + len(axes)
    places, rest = {a % rank for a in axes}, iter(given)
    return tuple(1 if i in places else next(rest) for i in range(rank))


def _squeeze(view: View) -> Shape | None:
    given, axes = view.shape(0), axes_of(view)
    if given is None or (axes is None and (view.has(1) or not static(given))):
        return None
    places = {i for i, d in enumerate(given) if d == 1} if axes is None else {a % len(given) for a in axes}
    # A size that is unknown has to be 1 there: for anything else the node is no valid one.
    return tuple(d for i, d in enumerate(given) if i not in places)


def _concat(view: View) -> Shape | None:
    shapes = [a.shape for a in view.arguments]
    first = shapes[0] if shapes else None
    if first is None or not first or any(s is None or len(s) != len(first) for s in shapes):
        return None
    known: list[Shape] = [s for s in shapes if s is not None]
    axis = int(view.attribute("axis", 1)) % len(first)
    total = plain(sum(s[axis] for s in known))
    # The other axes agree; an integer says more than a symbol.
    others = [next((s[i] for s in known if isinstance(s[i], int)), first[i]) for i in range(len(first))]
    return tuple(total if i == axis else d for i, d in enumerate(others))


def _slice(view: View) -> Shape | None:
    given, ranges = view.shape(0), slice_ranges(view)
    if given is None:
        return None
    if ranges is None:
        return tuple(map(view.atom, range(len(given))))
    dims = list(given)
    for axis, start, end, step in ranges:
        place = axis % len(dims)
        dims[place] = _sliced(view, place, dims[place], start, end, step)
    return tuple(dims)


def _sliced(view: View, axis: int, size: Dim, start: int, end: Dim, step: int) -> Dim:
    if isinstance(size, int) and isinstance(end, int) and step != 0:
        return len(range(*slice(start, end, step).indices(size)))
    whole = (isinstance(end, int) and end >= _END) or equal(end, size) is True
    return size if start == 0 and step == 1 and whole else view.atom(axis)


def split_shapes(view: View, outputs: int) -> list[Shape | None]:
    """The shapes of all outputs of a Split."""
    given, axis = view.shape(0), int(view.attribute("axis", 0))
    sizes: Sequence[Dim] | None = view.attribute("split", None) or view.integers(1)
    if given is None or (sizes is None and view.has(1)):
        return [None] * outputs
    size = given[axis % len(given)]
    if sizes is None and isinstance(size, int) and size % outputs == 0:
        sizes = [size // outputs] * outputs
    if sizes is None or len(sizes) != outputs:
        return [None] * outputs
    return [tuple(s if i == axis % len(given) else d for i, d in enumerate(given)) for s in sizes]


def _gather(view: View) -> Shape | None:
    given, index = view.shape(0), view.shape(1)
    if not given or index is None:
        return None
    axis = int(view.attribute("axis", 0)) % len(given)
    return (*given[:axis], *index, *given[axis + 1 :])


def _expand(view: View) -> Shape | None:
    wanted = view.elements(1)
    return None if wanted is None or _negative(wanted) else broadcast([view.shape(0), wanted], view.atom)


def _filled(view: View) -> Shape | None:
    wanted = view.elements(0)
    return None if wanted is None or _negative(wanted) else wanted


def _negative(dims: Sequence[Dim]) -> bool:
    return any(isinstance(d, int) and d < 0 for d in dims)


def _tile(view: View) -> Shape | None:
    given, repeats = view.shape(0), view.elements(1)
    if given is None or repeats is None or len(given) != len(repeats):
        return None
    return tuple(plain(d * r) for d, r in zip(given, repeats, strict=True))


def _pad(view: View) -> Shape | None:
    given = view.shape(0)
    pads = view.integers(1) if view.since >= 11 else view.attribute("pads", view.attribute("paddings", None))
    if given is None:
        return None
    axes = view.integers(3) if view.has(3) else range(len(given))
    if pads is None or axes is None:
        return tuple(map(view.atom, range(len(given))))
    dims = list(given)
    for i, axis in enumerate(axes):
        dims[axis % len(dims)] = plain(dims[axis % len(dims)] + int(pads[i]) + int(pads[i + len(axes)]))
    return tuple(dims)


def _matmul(view: View) -> Shape | None:
    a, b = view.shape(0), view.shape(1)
    if not a or not b:
        return None
    if len(b) == 1:
        return a[:-1]
    if len(a) == 1:
        return (*b[:-2], b[-1])
    batch = broadcast([a[:-2], b[:-2]], view.atom)
    return None if batch is None else (*batch, a[-2], b[-1])


def _gemm(view: View) -> Shape | None:
    a, b = view.shape(0), view.shape(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    return a[1 if view.attribute("transA", 0) else 0], b[0 if view.attribute("transB", 0) else 1]


def _spatial(view: View, channels: Dim | None) -> Shape | None:
    """Batch and channels; of the other axes the torch function knows more (see `facts`)."""
    given = view.shape(0)
    if not given or len(given) < 3 or channels is None:
        return None
    return (given[0], channels, *map(view.atom, range(2, len(given))))


def _range(view: View) -> Shape | None:
    start, end, step = (view.elements(i) for i in range(3))
    if start == (0,) and step == (1,) and end is not None:
        if isinstance(end[0], int):
            return (max(0, end[0]),)
        if end[0].is_nonnegative:
            return (end[0],)
    return (view.atom(0),)


def _same_rank(view: View) -> Shape | None:
    given = view.shape(0)
    return None if given is None else tuple(map(view.atom, range(len(given))))


def _dims(view: View, position: int) -> Dim | None:
    shape = view.shape(position)
    return shape[0 if view.name == "Conv" else 1] if shape and len(shape) > 1 else None


_SHAPES: dict[str, Callable[[Any], Shape | None]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda view: view.shape(1),
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": lambda view: _spatial(view, _dims(view, 1)),
    "MaxPool": lambda view: _spatial(view, _dims(view, 0)),
    "AveragePool": lambda view: _spatial(view, _dims(view, 0)),
    "Resize": _same_rank,
    "Range": _range,
    "Size": lambda view: (),
    "ConstantOfShape": _filled,
    "Split": lambda view: split_shapes(view, 1)[0],
}
