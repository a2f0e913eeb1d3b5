"""Lowerings of the torch functions that sites' `split` and `merge` and replacements consist of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.backends.onnx.builder import need
from graphopt.backends.onnx.mask_functions import operand
from graphopt.backends.onnx.table import Call, function_name, lowers, meta_of

_END = torch.iinfo(torch.int64).max


def _binary(call: Call, op_type: str) -> str:
    need(not call.kwargs.get("alpha") and not call.kwargs.get("rounding_mode"), f"{call.node.format_node()}")
    left, right = _promoted(call)
    return str(call.builder.op(op_type, left, right))


def _promoted(call: Call) -> tuple[str, str]:
    """Both operands in one element type, as torch promotes them; ONNX does not."""
    first, second = call.node.args[0], call.node.args[1]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return operand(call, 0, 1), operand(call, 1, 0)
    types = meta_of(first)[0], meta_of(second)[0]
    wide = torch.promote_types(*types)
    names = [a if t == wide else call.builder.cast(a, wide) for a, t in zip(call.args, types, strict=False)]
    return names[0], names[1]


@lowers("add", "iadd")
def _add(call: Call) -> str:
    return _binary(call, "Add")


@lowers("sub")
def _sub(call: Call) -> str:
    return _binary(call, "Sub")


@lowers("mul")
def _mul(call: Call) -> str:
    return _binary(call, "Mul")


@lowers("div", "true_divide")
def _div(call: Call) -> str:
    return _binary(call, "Div")


@lowers("matmul", "bmm")
def _matmul(call: Call) -> str:
    left, right = _promoted(call)
    return str(call.builder.op("MatMul", left, right))


_UNARY = {
    "cos": "Cos",
    "exp": "Exp",
    "neg": "Neg",
    "tanh": "Tanh",
    "sqrt": "Sqrt",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "abs": "Abs",
    "log": "Log",
}
_UNARY |= {"relu": "Relu", "erf": "Erf", "contiguous": "Identity"}


@lowers(*_UNARY)
def _unary(call: Call) -> str:
    return str(call.builder.op(_UNARY[function_name(call.node)], call.args[0]))


@lowers("linear")
def _linear(call: Call) -> str:
    x, weight, bias = call.args[0], call.args[1], call.get(2, "bias")
    transposed = call.builder.op("Transpose", weight, perm=[1, 0])
    product = call.builder.op("MatMul", x, transposed)
    return str(call.builder.op("Add", product, bias)) if bias else str(product)


@lowers("softmax")
def _softmax(call: Call) -> str:
    axis = call.axis(call.get(1, "dim"))
    # Before opset 13 Softmax flattens everything behind the axis: the same only for the last one.
    need(call.builder.opset >= 13 or axis == call.rank() - 1, "softmax over an inner axis needs opset 13")
    dtype = call.kwargs.get("dtype") or call.dtype()
    value = call.args[0] if dtype == call.dtype() else call.builder.cast(call.args[0], dtype)
    return str(call.builder.op("Softmax", value, axis=axis))


def _permute(call: Call, order: list[int]) -> str:
    return str(call.builder.op("Transpose", call.args[0], perm=order))


@lowers("transpose")
def _transpose(call: Call) -> str:
    first, second = call.axis(call.get(1, "dim0")), call.axis(call.get(2, "dim1"))
    order = list(range(call.rank()))
    order[first], order[second] = second, first
    return _permute(call, order)


@lowers("permute")
def _permuted(call: Call) -> str:
    dims = call.args[1:] if len(call.args) > 2 else call.get(1, "dims")
    return _permute(call, [call.axis(d) for d in dims])


@lowers("unflatten")
def _unflatten(call: Call) -> str:
    """Reshape; 0 copies a leading size, so everything before the axis may be dynamic, and one size may be -1."""
    axis, sizes = call.axis(call.get(1, "dim")), list(call.get(2, "sizes"))
    behind = call.rank() - axis - 1
    if behind == 0:
        return str(call.builder.op("Reshape", call.args[0], call.builder.ints(*[0] * axis, *sizes)))
    shape = call.builder.op("Shape", call.args[0])
    tail = call.builder.slice(shape, 0, axis + 1, _END)
    head = [call.builder.slice(shape, 0, 0, axis)] if axis else []
    full = call.builder.op("Concat", *head, call.builder.ints(*sizes), tail, axis=0)
    return str(call.builder.op("Reshape", call.args[0], full))


@lowers("flatten")
def _flatten(call: Call) -> str:
    start, end = call.axis(call.get(1, "start_dim", 0)), call.axis(call.get(2, "end_dim", -1))
    if end == call.rank() - 1:
        return str(call.builder.op("Reshape", call.args[0], call.builder.ints(*[0] * start, -1)))
    shape = call.builder.op("Shape", call.args[0])
    head = [call.builder.slice(shape, 0, 0, start)] if start else []
    tail = call.builder.slice(shape, 0, end + 1, _END)
    full = call.builder.op("Concat", *head, call.builder.ints(-1), tail, axis=0)
    return str(call.builder.op("Reshape", call.args[0], full))


@lowers("unsqueeze")
def _unsqueeze(call: Call) -> str:
    axis = call.get(1, "dim")
    return call.builder.unsqueeze(call.args[0], axis if axis >= 0 else axis + call.rank() + 1)


@lowers("squeeze")
def _squeeze(call: Call) -> str:
    return call.builder.squeeze(call.args[0], call.axis(call.get(1, "dim")))


@lowers("narrow")
def _narrow(call: Call) -> str:
    axis, start, length = call.axis(call.get(1, "dim")), call.get(2, "start"), call.get(3, "length")
    end = start + length
    return call.builder.slice(call.args[0], axis, start, end if end or start >= 0 else _END)


@lowers("cat", "concat")
def _cat(call: Call) -> str:
    first: Any = call.node.args[0]
    axis = call.get(1, "dim", 0)
    return str(call.builder.op("Concat", *call.args[0], axis=axis if axis >= 0 else axis + meta_of(first[0])[1]))


@lowers("to", "type", "_to_copy")
def _to(call: Call) -> str:
    dtype = call.get(1, "dtype")
    need(isinstance(dtype, torch.dtype), f"{call.node.format_node()}")
    return call.builder.cast(call.args[0], dtype)


@lowers("where")
def _where(call: Call) -> str:
    condition, chosen, other = call.args
    kind = call.node.meta["dtype"]
    sides = [v if isinstance(v, str) else call.builder.constant(torch.tensor(v, dtype=kind)) for v in (chosen, other)]
    return str(call.builder.op("Where", condition, *sides))


@lowers("repeat_interleave")
def _repeat_interleave(call: Call) -> str:
    """Insert an axis behind `dim`, expand it, and join the two: [.., n, ..] -> [.., n * r, ..]."""
    repeats, axis = call.args[1], call.axis(call.get(2, "dim"))
    need(isinstance(repeats, int), "repeat_interleave with a tensor of repeats")
    builder, rank = call.builder, call.rank()
    sizes = [1] * (rank + 1)
    sizes[axis + 1] = repeats
    wide = builder.op("Expand", builder.unsqueeze(call.args[0], axis + 1), builder.ints(*sizes))
    shape = builder.op("Shape", call.args[0])
    head = [builder.slice(shape, 0, 0, axis)] if axis else []
    tail = [builder.slice(shape, 0, axis + 1, _END)] if axis + 1 < rank else []
    full = builder.op("Concat", *head, builder.ints(-1), *tail, axis=0) if head or tail else builder.ints(-1)
    return str(builder.op("Reshape", wide, full))
