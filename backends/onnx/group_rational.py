"""ONNX form of the grouped rational function, alone and behind a linear layer: Horner's rule in primitive operators."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch

from graphopt.backends.onnx.attention_parts import suffix
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers, meta_of, shape_of
from graphopt.ops.group_rational import FARTHEST

# On onnxruntime a value with more entries than this goes through Scan, in blocks of so many rows as divide the rows:
# some twenty operators in a row then find their operand in cache. Blocks of fewer entries cost more than they save.
_LARGE, _ROWS, _LEAST = 1 << 20, (1, 2, 4, 8, 16, 32), 1 << 14
_SCAN_OPSET = 11

_Evaluate = Callable[[Builder, str], str]
"""Makes the nodes of the function: from the name of x [.., G, C / G] to the name of the value."""


@lowers("graphopt::group_rational")
def _group_rational(call: Call) -> str:
    """P / Q over [.., G, C / G], or over x as it is where all channels share the coefficients."""
    return _rational(call, call.args[0], 1, blocks=False)


@lowers("graphopt::group_rational", target="onnxruntime")
def _group_rational_in_blocks(call: Call) -> str:
    """The same, through Scan where x is large. That is standard ONNX too, but loops are slow on GPUs."""
    return _rational(call, call.args[0], 1, blocks=True)


@lowers("graphopt::linear_rational")
def _linear_rational(call: Call) -> str:
    """X W^T + b, and the function."""
    return _rational(call, _product(call), 3, blocks=False)


@lowers("graphopt::linear_rational", target="onnxruntime")
def _linear_rational_in_blocks(call: Call) -> str:
    return _rational(call, _product(call), 3, blocks=True)


def _product(call: Call) -> str:
    turned = call.builder.op("Transpose", call.args[1], perm=[1, 0])
    product = str(call.builder.op("MatMul", call.args[0], turned))
    bias = call.get(2, "bias")
    return str(call.builder.op("Add", product, bias)) if bias else product


def _rational(call: Call, x: str, first: int, blocks: bool) -> str:
    """The function of the value x.

    Args:
        call: of an operator whose operand at 0 has the type and rank of x.
        x: its name.
        first: position of the numerator; denominator, form and split follow.
        blocks: see `_LARGE`.
    """
    places = ((first, "numerator"), (first + 1, "denominator"))
    form, split = call.get(first + 2, "form", "abs_sum"), call.get(first + 3, "split", False)
    numerator, denominator = (shape_of(call.operand(i, name)) for i, name in places)
    groups, channels = max(numerator[0], denominator[0]), shape_of(call.node)[-1]
    dtype = call.dtype()
    wide = torch.promote_types(dtype, torch.float32)
    kinds = [meta_of(call.operand(i, name))[0] for i, name in places]
    rank = call.rank()
    blocks = blocks and rank > 1 and call.builder.opset >= _SCAN_OPSET

    def body(b: Builder, inputs: list[str]) -> str:
        x, *given = inputs
        x = x if dtype == wide else b.cast(x, wide)
        coefficients = [c if kind == wide else b.cast(c, wide) for c, kind in zip(given, kinds, strict=True)]
        if groups > 1:
            x = str(b.op("Reshape", x, b.ints(*[0] * (rank - 1), groups, channels // groups)))
        top = _columns(b, coefficients[0], numerator[1])
        below = _columns(b, coefficients[1], denominator[1])
        if form == "sum_abs":
            below = [str(b.op("Abs", c)) for c in below]

        def evaluate(inner: Builder, value: str) -> str:
            return _evaluated(inner, value, top, below, form, split, wide)

        value = _in_blocks(b, x, evaluate, 2 if groups > 1 else 1, wide) if blocks else evaluate(b, x)
        if groups > 1:
            value = str(b.op("Reshape", value, b.ints(*[0] * (rank - 1), channels)))
        return value if dtype == wide else b.cast(value, dtype)

    sizes = (form, "split" if split else "plain", rank, channels, *numerator, *denominator)
    name = f"GroupRational_{'_'.join(map(str, sizes))}_{'_'.join(map(suffix, (dtype, *kinds)))}"
    given = [call.get(i, key) for i, key in places]
    return str(call.builder.function(f"{name}_blocks" if blocks else name, [x, *given], body))


def _evaluated(
    b: Builder, whole: str, top: list[str], below: list[str], form: str, split: bool, wide: torch.dtype
) -> str:
    """R(x), or relu(x) - R(|x|), of coefficients by power."""
    x = str(b.op("Min", b.op("Abs", whole), b.number(FARTHEST, wide))) if split else whole
    value = _horner(b, x, top)
    if below:
        if form == "sum_abs":
            base = x if split else str(b.op("Abs", x))
            inner = b.op("Mul", base, _horner(b, base, below))
        else:
            inner = b.op("Abs", b.op("Mul", x, _horner(b, x, below)))
        value = str(b.op("Div", value, b.op("Add", inner, b.number(1, wide))))
    return str(b.op("Sub", b.op("Relu", whole), value)) if split else value


def _in_blocks(b: Builder, x: str, evaluate: _Evaluate, last: int, wide: torch.dtype) -> str:
    """`evaluate` block by block where x is large enough; the last axes, as many as `last`, make up a row."""
    shape = str(b.op("Shape", x))
    row = b.slice(shape, 0, -last, torch.iinfo(torch.int64).max)
    rows = b.op("ReduceProd", b.slice(shape, 0, 0, -last), keepdims=0)
    counts = b.ints(*_ROWS)
    divides = b.op("Equal", b.op("Mod", rows, counts), b.number(0))
    block = b.largest(str(b.op("Where", divides, counts, b.number(1))))
    entries = b.op("Mul", block, b.op("ReduceProd", row, keepdims=0))
    large = b.op("Greater", b.op("Size", x), b.number(_LARGE))
    enough = b.op("Greater", entries, b.number(_LEAST - 1))
    worth = b.op("And", large, b.squeeze(str(enough), 0))

    def scanned(inner: Builder, _: list[str]) -> str:
        parts = inner.op("Reshape", x, inner.op("Concat", inner.ints(-1), block, row, axis=0))
        loop = inner.graph("block", lambda deeper, names: evaluate(deeper, names[0]), ["x"], wide)
        for value in (*loop.input, *loop.output):  # onnxruntime wants to know the rank at least
            value.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in range(last + 1))
        return str(inner.op("Reshape", inner.op("Scan", parts, body=loop, num_scan_inputs=1), shape))

    then = b.graph("blocks", scanned, dtype=wide)
    otherwise = b.graph("whole", lambda inner, _: evaluate(inner, x), dtype=wide)
    return str(b.op("If", worth, then_branch=then, else_branch=otherwise))


def _columns(b: Builder, coefficients: str, count: int) -> list[str]:
    """[G, count] -> count times [G, 1]; of constants only, so runtimes compute them when they load the model."""
    return [b.slice(coefficients, 1, i, i + 1) for i in range(count)]


def _horner(b: Builder, x: str, coefficients: list[str]) -> str:
    """c_0 + x (c_1 + ...), in the shape of x."""
    if len(coefficients) == 1:
        return str(b.op("Expand", coefficients[0], b.op("Shape", x)))
    value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        value = str(b.op("Add", b.op("Mul", x, value), c))
    return value
