"""Lowerings of the torch functions that features, gates and norms consist of, and of indexing."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.mask_functions import operand
from graphopt.backends.onnx.table import Call, function_name, lowers

_END = torch.iinfo(torch.int64).max


def _reduced(b: Builder, op_type: str, value: str, axes: list[int], keep: bool) -> str:
    """A reduction; its axes became an input in opset 18, those of ReduceSum in 13."""
    if b.opset >= (13 if op_type == "ReduceSum" else 18):
        return str(b.op(op_type, value, b.ints(*axes), keepdims=int(keep)))
    return str(b.op(op_type, value, axes=axes, keepdims=int(keep)))


def _axes(call: Call) -> list[int]:
    given = call.get(1, "dim")
    if given is None:
        return list(range(call.rank()))
    return [call.axis(a) for a in (given if isinstance(given, (list, tuple)) else [given])]


@lowers("sum", "mean")
def _sum(call: Call) -> str:
    result = call.node.meta["dtype"]  # torch sums booleans and small integers as int64
    value = call.args[0] if call.dtype() == result else call.builder.cast(call.args[0], result)
    op_type = "ReduceSum" if function_name(call.node) == "sum" else "ReduceMean"
    return _reduced(call.builder, op_type, value, _axes(call), bool(call.get(2, "keepdim", False)))


@lowers("rsqrt")
def _rsqrt(call: Call) -> str:
    return str(call.builder.op("Reciprocal", call.builder.op("Sqrt", call.args[0])))


@lowers("square", "pow")
def _pow(call: Call) -> str:
    if function_name(call.node) == "square" or call.args[1] == 2:
        return str(call.builder.op("Mul", call.args[0], call.args[0]))
    return str(call.builder.op("Pow", operand(call, 0, 1), operand(call, 1, 0)))


@lowers("maximum", "minimum")
def _extreme(call: Call) -> str:
    op_type = "Max" if function_name(call.node) == "maximum" else "Min"
    return str(call.builder.op(op_type, *call.args))


@lowers("softplus")
def _softplus(call: Call) -> str:
    need(call.get(1, "beta", 1) == 1, f"{call.node.format_node()}")
    return str(call.builder.op("Softplus", call.args[0]))


@lowers("log_sigmoid", "logsigmoid")
def _log_sigmoid(call: Call) -> str:
    """-softplus(-x), which neither overflows nor takes the logarithm of 0."""
    negative = call.builder.op("Softplus", call.builder.op("Neg", call.args[0]))
    return str(call.builder.op("Neg", negative))


@lowers("silu")
def _silu(call: Call) -> str:
    return str(call.builder.op("Mul", call.args[0], call.builder.op("Sigmoid", call.args[0])))


@lowers("elu")
def _elu(call: Call) -> str:
    return str(call.builder.op("Elu", call.args[0], alpha=float(call.get(1, "alpha", 1.0))))


@lowers("float")
def _float(call: Call) -> str:
    return call.builder.cast(call.args[0], torch.float32)


@lowers("normalize")
def _normalize(call: Call) -> str:
    """Divide by max(|x|, eps) along one axis."""
    need(call.get(1, "p", 2.0) == 2, f"{call.node.format_node()}")
    b, axis = call.builder, call.axis(call.get(2, "dim", 1))
    eps = b.number(call.get(3, "eps", 1e-12), call.dtype())
    length = b.op("Max", _reduced(b, "ReduceL2", call.args[0], [axis], True), eps)
    return str(b.op("Div", call.args[0], length))


@lowers("rms_norm")
def _rms_norm(call: Call) -> str:
    """Divide by sqrt(mean(x^2) + eps) over the last axes, in fp32 or better as torch does."""
    b, dtype = call.builder, call.dtype()
    wide = torch.promote_types(dtype, torch.float32)
    shape, weight, eps = call.get(1, "normalized_shape"), call.get(2, "weight"), call.get(3, "eps")
    axes = list(range(call.rank() - len(shape), call.rank()))
    value = call.args[0] if dtype == wide else b.cast(call.args[0], wide)
    mean = _reduced(b, "ReduceMean", str(b.op("Mul", value, value)), axes, True)
    shift = b.number(torch.finfo(dtype).eps if eps is None else eps, wide)
    out = b.op("Div", value, b.op("Sqrt", b.op("Add", mean, shift)))
    if weight:
        out = b.op("Mul", out, weight if dtype == wide else b.cast(weight, wide))
    return str(out) if dtype == wide else b.cast(out, dtype)


@lowers("getitem")
def _getitem(call: Call) -> str:
    """x[..] with numbers, slices with positive steps, None and an ellipsis; bounds clamp in ONNX as in Python."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    allowed = all(x is None or x is ... or isinstance(x, (int, slice)) for x in index)
    need(allowed and not any(isinstance(x, bool) for x in index), f"{call.node.format_node()}")
    cuts: list[tuple[int, int, int, int]] = []
    picked: list[tuple[int, int]] = []
    added: list[int] = []
    axis = place = 0
    for x in index:
        if x is ...:
            missing = call.rank() - sum(isinstance(y, (int, slice)) for y in index)
            axis, place = axis + missing, place + missing
        elif x is None:
            added.append(place)
            place += 1
        elif isinstance(x, int):
            picked.append((axis, x))
            axis += 1
        else:
            cuts += _cut(call, axis, x)
            axis, place = axis + 1, place + 1
    return _taken(call.builder, call.args[0], cuts, picked, added)


def _cut(call: Call, axis: int, x: slice) -> list[tuple[int, int, int, int]]:
    numbers = [x.start, x.stop, x.step]
    need(all(n is None or isinstance(n, int) for n in numbers), f"{call.node.format_node()}")
    return [] if x == slice(None) else [(axis, x.start or 0, _END if x.stop is None else x.stop, x.step or 1)]


def _taken(
    b: Builder, value: Any, cuts: list[tuple[int, int, int, int]], picked: list[tuple[int, int]], added: list[int]
) -> str:
    """Slices first, then single places from the last axis on, then new axes: each leaves the axes before it."""
    if cuts and b.opset >= 10:
        axes, starts, ends, steps = (b.ints(*x) for x in zip(*cuts, strict=True))
        value = b.op("Slice", value, starts, ends, axes, steps)
    else:
        need(all(step == 1 for *_, step in cuts), "slices with steps below opset 10")
        for axis, start, end, _ in cuts:
            value = b.slice(value, axis, start, end)
    for axis, place in reversed(picked):
        value = b.op("Gather", value, b.number(place), axis=axis)
    for place in added:
        value = b.unsqueeze(value, place)
    return str(value if cuts or picked or added else b.op("Identity", value))
