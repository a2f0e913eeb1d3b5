"""ONNX forms of the softmax operators: model-local functions of standard operators, along any axis, from opset 9 on.

Standard operators have no loop over the entries of a row, so that each step here is a pass over the row of its own: the
numbers are the operators', their speed is not. Maxima decide about shifts and bounds alone, never about NaN, which not
every runtime's ReduceMax keeps: it travels through the exponentials into the sum, and from there into the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphopt.backends.onnx.attention_parts import suffix
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers, shape_of
from graphopt.ops.two_pass_softmax import FLUSH, LN2_HIGH_64, LN2_LOW_64, LOG2_E
from graphopt.ops.unified_max_softmax import HIGH, LOW

# ln 2 in two parts, the first of 9 bits: times a whole number below 2^15 it is exact in fp32 without a fused
# multiply-add, which ONNX does not promise.
_LN2_HIGH = float.fromhex("0x1.63p-1")
_LN2 = {torch.float32: (_LN2_HIGH, math.log(2) - _LN2_HIGH), torch.float64: (LN2_HIGH_64, LN2_LOW_64)}
# Rows whose largest entry is beyond this are shifted by it, so that n ln 2 stays exact.
_LARGEST = 2048.0
# Runtimes add up a row from one end to the other: over tens of thousands of like terms that loses 8 bits of fp32. Rows
# that were observed to be so long are added up in blocks.
_LONG, _BLOCK = 1024, 256


@dataclass(frozen=True)
class Rows:
    """How to reduce: along which axis, computed in which type, and whether in blocks (of the last axis alone)."""

    axis: int
    wide: torch.dtype
    rank: int
    blocked: bool


Body = Callable[[Builder, str, Rows], str]
"""From the name of x in fp32 or fp64, and its rows, to the name of the result."""


@lowers("graphopt::two_pass_softmax")
def _two_pass(call: Call) -> str:
    """e^x = m 2^n with m in [0.7, 1.42]; the sum is that of m 2^(n - N), N the largest n.

    N is that of the row's largest entry, since rounding is monotonic. The mantissa is Exp in place of the operator's
    polynomial, which would be ten nodes; a power of two is Pow(2, n), exact for whole n in every library we know.
    """
    return _function(call, "TwoPassSoftmax", _pairs)


@lowers("graphopt::online_softmax")
def _online(call: Call) -> str:
    """The safe softmax in three passes, since a running maximum has no form in standard operators."""
    return _function(call, "OnlineSoftmax", _own_maximum)


@lowers("graphopt::unified_max_softmax")
def _unified_max(call: Call) -> str:
    """Each row is shifted by phi, or by its own maximum where that lies outside of the bounds."""
    phi, low, high = call.get(2, "phi", 0.0), call.get(3, "low", LOW), call.get(4, "high", HIGH)

    def body(b: Builder, x: str, rows: Rows) -> str:
        largest, wide = _largest(b, x, rows.axis), rows.wide
        shift = b.number(phi, wide)
        distance = b.op("Sub", largest, shift)
        above = b.op("Greater", distance, b.number(low, wide))
        below = b.op("Less", distance, b.number(high, wide))
        fits = b.op("And", above, below)
        shift = b.op("Where", fits, shift, _finite(b, largest, wide))
        return _normalised(b, b.op("Exp", b.op("Sub", x, shift)), rows)

    return _function(call, f"UnifiedMaxSoftmax_{phi!r}_{low!r}_{high!r}", body)


def _function(call: Call, stem: str, body: Body) -> str:
    """A call of the function for this axis and type; computed in fp32 or better, rounded once."""
    b, dtype, rank = call.builder, call.dtype(), call.rank()
    need(rank > 0, "softmax of a scalar")
    need(b.opset >= 9, f"softmax below opset 9, which has no Where: this is {b.opset}")
    axis = call.axis(call.get(1, "dim", -1))
    if b.opset >= 11:  # one function for all ranks; before, reductions took no negative axes
        axis -= rank
    wide = torch.promote_types(dtype, torch.float32)
    length = shape_of(call.node)[axis]
    # Pad takes computed sizes from opset 11 on, and with it this axis is negative.
    rows = Rows(axis, wide, rank, blocked=axis == -1 and length >= _LONG)

    def whole(inner: Builder, names: list[str]) -> str:
        (x,) = names
        y = body(inner, x if dtype == wide else inner.cast(x, wide), rows)
        return y if dtype == wide else inner.cast(y, dtype)

    name = f"{stem}_axis{axis}_{suffix(dtype)}{f'_blocks_of_rank{rank}' if rows.blocked else ''}"
    return str(b.function(name, [call.args[0]], whole))


def _own_maximum(b: Builder, x: str, rows: Rows) -> str:
    shift = _finite(b, _largest(b, x, rows.axis), rows.wide)
    return _normalised(b, b.op("Exp", b.op("Sub", x, shift)), rows)


def _pairs(b: Builder, x: str, rows: Rows) -> str:
    wide = rows.wide
    hidden = _is_masked(b, x, wide)
    largest = _largest(b, x, rows.axis)
    near = b.op("Less", b.op("Abs", largest), b.number(_LARGEST, wide))
    shift = b.op("Where", near, b.number(0, wide), _finite(b, largest, wide))
    # Far below the largest entry any number weighs 0, and this one has an n of few bits.
    lowest = b.number(-2 * _LARGEST, wide)
    shifted = b.op("Sub", x, shift)
    shifted = b.op("Where", b.op("Less", shifted, lowest), lowest, shifted)
    n, top = (_exponent(b, value, wide) for value in (shifted, b.op("Sub", largest, shift)))
    t = shifted
    for part in _LN2[wide]:
        t = b.op("Sub", t, b.op("Mul", n, b.number(part, wide)))
    delta = b.op("Sub", n, top)
    # Whole numbers at or below the flush; NaN is no such number and goes on.
    flushed = b.op("Or", hidden, b.op("Less", delta, b.number(FLUSH[wide] + 0.5, wide)))
    weights = b.op("Mul", b.op("Exp", t), b.op("Pow", b.number(2, wide), delta))
    return _normalised(b, b.op("Where", flushed, b.number(0, wide), weights), rows)


def _exponent(b: Builder, value: str, wide: torch.dtype) -> str:
    """The whole number nearest to x log2 e; Round came with opset 11."""
    scaled = b.op("Mul", value, b.number(LOG2_E, wide))
    return str(b.op("Floor", b.op("Add", scaled, b.number(0.5, wide))))


def _is_masked(b: Builder, x: str, wide: torch.dtype) -> str:
    """Where x is -inf; floats are compared for equality from opset 11 on."""
    return str(b.op("Less", x, b.number(torch.finfo(wide).min, wide)))


def _largest(b: Builder, x: str, axis: int) -> str:
    """Maximum along one axis, kept; the axes became an input in opset 18."""
    if b.opset >= 18:
        return str(b.op("ReduceMax", x, b.ints(axis), keepdims=1))
    return str(b.op("ReduceMax", x, axes=[axis], keepdims=1))


def _finite(b: Builder, largest: str, wide: torch.dtype) -> str:
    """What to subtract from a row: its maximum, or 0 where all is -inf, since -inf - -inf is NaN."""
    return str(b.op("Where", _is_masked(b, largest, wide), b.number(0, wide), largest))


def _normalised(b: Builder, weights: str, rows: Rows) -> str:
    """Weights over their sum; zeros where all are 0. No other sum is below the normal numbers."""
    total = _sum_of_blocks(b, weights, rows.rank) if rows.blocked else b.sum(weights, rows.axis)
    empty = b.op("Less", total, b.number(torch.finfo(rows.wide).smallest_normal, rows.wide))
    return str(b.op("Div", weights, b.op("Where", empty, b.number(1, rows.wide), total)))


def _sum_of_blocks(b: Builder, weights: str, rank: int) -> str:
    """[.., N] -> [.., 1]: the sums of blocks, and their sum; zeros fill the last block."""
    shape, block = b.op("Shape", weights), b.ints(_BLOCK)
    length = b.op("Gather", shape, b.ints(rank - 1), axis=0)
    count = b.op("Add", b.op("Div", length, block), b.ints(1))
    missing = b.op("Sub", b.op("Mul", count, block), length)
    filled = b.op("Pad", weights, b.op("Concat", b.ints(*[0] * (2 * rank - 1)), missing, axis=0))
    leading = b.slice(str(shape), 0, 0, rank - 1)
    blocks = b.op("Reshape", filled, b.op("Concat", leading, count, block, axis=0))
    total = b.sum(b.sum(str(blocks), -1), -2)
    # No Squeeze: onnxruntime leaves the axes of an empty value as long as they are when it reduces them.
    return str(b.op("Reshape", total, b.op("Concat", leading, b.ints(1), axis=0)))
