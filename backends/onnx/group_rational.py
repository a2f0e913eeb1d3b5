"""ONNX form of the grouped rational function: Horner's rule in primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention_parts import suffix
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers, meta_of, shape_of
from graphopt.ops.group_rational import FARTHEST


@lowers("graphopt::group_rational")
def _group_rational(call: Call) -> str:
    """P / Q over [.., G, C / G], or over x as it is where all channels share the coefficients."""
    form, split = call.get(3, "form", "abs_sum"), call.get(4, "split", False)
    numerator, denominator = (shape_of(call.operand(i, name)) for i, name in ((1, "numerator"), (2, "denominator")))
    groups = max(numerator[0], denominator[0])
    dtype = call.dtype()
    wide = torch.promote_types(dtype, torch.float32)
    kinds = [meta_of(call.operand(i, name))[0] for i, name in ((1, "numerator"), (2, "denominator"))]
    rank = call.rank()

    def body(b: Builder, inputs: list[str]) -> str:
        x, *given = inputs
        x = x if dtype == wide else b.cast(x, wide)
        coefficients = [c if kind == wide else b.cast(c, wide) for c, kind in zip(given, kinds, strict=True)]
        if groups > 1:
            x = str(b.op("Reshape", x, b.ints(*[0] * (rank - 1), groups, -1)))
        whole = x
        if split:
            x = str(b.op("Min", b.op("Abs", x), b.number(FARTHEST, wide)))
        top = _horner(b, x, _columns(b, coefficients[0], numerator[1]))
        value = top
        if denominator[1]:
            below = _columns(b, coefficients[1], denominator[1])
            if form == "sum_abs":
                base = str(b.op("Abs", x))
                inner = b.op("Mul", base, _horner(b, base, [str(b.op("Abs", c)) for c in below]))
            else:
                inner = b.op("Abs", b.op("Mul", x, _horner(b, x, below)))
            value = str(b.op("Div", top, b.op("Add", inner, b.number(1, wide))))
        if split:
            value = str(b.op("Sub", b.op("Relu", whole), value))
        if groups > 1:
            value = str(b.op("Reshape", value, b.ints(*[0] * (rank - 1), -1)))
        return value if dtype == wide else b.cast(value, dtype)

    sizes = (form, "split" if split else "plain", rank, *numerator, *denominator)
    name = f"GroupRational_{'_'.join(map(str, sizes))}_{'_'.join(map(suffix, (dtype, *kinds)))}"
    return str(call.builder.function(name, call.args[:3], body))


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
