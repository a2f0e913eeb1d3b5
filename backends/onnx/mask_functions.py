"""Lowerings of the torch functions that compose a mask out of several: comparisons, logic, running sums."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.builder import need
from graphopt.backends.onnx.table import Call, function_name, lowers

_COMPARISONS = {"lt": "Less", "gt": "Greater", "eq": "Equal"}
_NEGATED = {"ge": "Less", "le": "Greater", "ne": "Equal"}
_LOGIC = {"logical_and": "And", "logical_or": "Or", "bitwise_and": "And", "bitwise_or": "Or"}


def operand(call: Call, index: int, other: int) -> str:
    """A positional argument as a value name; a number becomes a constant of the other argument's type."""
    value = call.args[index]
    if isinstance(value, str):
        return value
    return call.builder.constant(torch.tensor(value, dtype=call.dtype(other)), "scalar")


@lowers(*_COMPARISONS)
def _compare(call: Call) -> str:
    return str(call.builder.op(_COMPARISONS[function_name(call.node)], operand(call, 0, 1), operand(call, 1, 0)))


@lowers(*_NEGATED)
def _negated(call: Call) -> str:
    """A >= b as not (a < b): GreaterOrEqual came only with opset 12. Integers have no NaN to tell them apart."""
    name = function_name(call.node)
    need(name == "ne" or not call.dtype().is_floating_point or call.builder.opset >= 12, f"{name} of floats below 12")
    if name != "ne" and call.builder.opset >= 12:
        op_type = {"ge": "GreaterOrEqual", "le": "LessOrEqual"}[name]
        return str(call.builder.op(op_type, operand(call, 0, 1), operand(call, 1, 0)))
    return str(call.builder.op("Not", call.builder.op(_NEGATED[name], operand(call, 0, 1), operand(call, 1, 0))))


@lowers(*_LOGIC)
def _logic(call: Call) -> str:
    sides = [a if call.dtype(i) == torch.bool else call.builder.cast(a, torch.bool) for i, a in enumerate(call.args)]
    return str(call.builder.op(_LOGIC[function_name(call.node)], *sides))


@lowers("logical_not")
def _not(call: Call) -> str:
    value = call.args[0] if call.dtype() == torch.bool else call.builder.cast(call.args[0], torch.bool)
    return str(call.builder.op("Not", value))


@lowers("ones_like", "zeros_like")
def _like(call: Call) -> str:
    dtype = call.kwargs.get("dtype") or call.dtype()
    fill = torch.tensor(int(function_name(call.node) == "ones_like"), dtype=dtype)
    return str(call.builder.op("Expand", call.builder.constant(fill, "fill"), call.builder.op("Shape", call.args[0])))


@lowers("cumsum")
def _cumsum(call: Call) -> str:
    axis = call.builder.constant(torch.tensor(call.axis(call.get(1, "dim"))), "axis")
    value = call.args[0]
    result = call.node.meta["dtype"]  # torch sums booleans and small integers as int64
    if call.dtype() != result:
        value = call.builder.cast(value, result)
    return str(call.builder.op("CumSum", value, axis))


@lowers("amax", "amin")
def _extreme(call: Call) -> str:
    op_type = "ReduceMax" if function_name(call.node) == "amax" else "ReduceMin"
    axes = call.get(1, "dim")
    axes = [call.axis(a) for a in (axes if isinstance(axes, (list, tuple)) else [axes])]
    keep = int(bool(call.get(2, "keepdim", False)))
    if call.builder.opset >= 18:
        return str(call.builder.op(op_type, call.args[0], call.builder.ints(*axes), keepdims=keep))
    return str(call.builder.op(op_type, call.args[0], axes=axes, keepdims=keep))


@lowers("clamp", "clip")
def _clamp(call: Call) -> str:
    value = call.args[0]
    for op_type, index, name in (("Max", 1, "min"), ("Min", 2, "max")):
        bound = call.get(index, name)
        if bound is None:
            continue
        if not isinstance(bound, str):
            bound = call.builder.constant(torch.tensor(bound, dtype=call.dtype()), name)
        value = str(call.builder.op(op_type, value, bound))
    return str(value)


@lowers("pad")
def _pad(call: Call) -> str:
    """Constant padding; torch counts axes from the last one, ONNX gives all starts and then all ends."""
    widths, rank = list(call.get(1, "pad")), call.rank()
    need(call.get(2, "mode", "constant") == "constant" and call.builder.opset >= 11, f"{call.node.format_node()}")
    starts, ends = [0] * rank, [0] * rank
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        starts[rank - 1 - i], ends[rank - 1 - i] = before, after
    dtype = call.dtype()
    fill = call.get(3, "value") or 0
    # Pad takes booleans only since opset 13: they travel as integers.
    value = call.builder.cast(call.args[0], torch.int32) if dtype == torch.bool else call.args[0]
    kind = torch.int32 if dtype == torch.bool else dtype
    pads, constant = call.builder.ints(*starts, *ends), call.builder.constant(torch.tensor(fill, dtype=kind), "fill")
    out = call.builder.op("Pad", value, pads, constant)
    return call.builder.cast(out, dtype) if dtype == torch.bool else str(out)
