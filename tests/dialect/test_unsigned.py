"""uint16, uint32 and uint64, in whose upper halves a torch that computes with signed integers would go wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.dialect import lookup

OPSET = 28
TYPES = [np.uint16, np.uint32, np.uint64]


def values(kind: Any) -> np.ndarray[Any, Any]:
    """The lowest, the highest, and both sides of the middle."""
    top = int(np.iinfo(kind).max)
    return np.array([0, top // 2, 1, top, 7, top // 2 + 1, top - 1, 12345], dtype=kind)


def call(name: str, *inputs: Any, **options: Any) -> Any:
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    return lookup("", name, OPSET).function(*tensors, **options)


def check(found: torch.Tensor, wanted: Any, kind: Any) -> None:
    wanted = np.asarray(wanted, dtype=kind)
    assert found.numpy().dtype == wanted.dtype
    np.testing.assert_array_equal(found.numpy(), wanted)


BINARY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.floor_divide,
    "Mod": np.mod,
    "Max": np.maximum,
    "Min": np.minimum,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseXor": np.bitwise_xor,
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "LessOrEqual": np.less_equal,
    "GreaterOrEqual": np.greater_equal,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", [*BINARY, *COMPARISONS])
def test_pairs(name: str, kind: Any) -> None:
    a, b = values(kind)[:, None], values(kind)[None, :]
    b = b[b != 0] if name in ("Div", "Mod") else b
    with np.errstate(over="ignore"):
        wanted = {**BINARY, **COMPARISONS}[name](a, b)
    check(call(name, a, b), wanted, bool if name in COMPARISONS else kind)


@pytest.mark.parametrize("kind", TYPES)
def test_each_alone(kind: Any) -> None:
    x = values(kind)
    check(call("Abs", x), x, kind)
    check(call("Sign", x), x != 0, kind)
    check(call("BitwiseNot", x), ~x, kind)
    check(call("Clip", x, x[4], x[5]), np.clip(x, x[4], x[5]), kind)
    check(call("NonZero", x), np.nonzero(x), np.int64)


@pytest.mark.parametrize("kind", TYPES)
def test_reductions(kind: Any) -> None:
    x = values(kind).reshape(2, 4)
    axes = np.array([1])
    with np.errstate(over="ignore"):
        check(call("ReduceMax", x, axes), x.max(1, keepdims=True), kind)
        check(call("ReduceMin", x, axes), x.min(1, keepdims=True), kind)
        check(call("ReduceSum", x, axes), x.sum(1, keepdims=True, dtype=kind), kind)
        check(call("ReduceProd", x, axes), x.prod(1, keepdims=True, dtype=kind), kind)
        check(call("CumSum", x, np.array(1)), np.cumsum(x, 1, dtype=kind), kind)
    check(call("ArgMax", x, axis=1), x.argmax(1)[:, None], np.int64)
    check(call("ArgMin", x, axis=1), x.argmin(1)[:, None], np.int64)
    empty = np.zeros((2, 0), kind)
    check(call("ReduceMax", empty, axes), np.full((2, 1), np.iinfo(kind).min), kind)
    check(call("ReduceMin", empty, axes), np.full((2, 1), np.iinfo(kind).max), kind)


@pytest.mark.parametrize("kind", TYPES)
def test_order_and_place(kind: Any) -> None:
    x = values(kind)
    best, where = call("TopK", x, np.array([3]))
    check(best, np.sort(x)[::-1][:3], kind)
    check(where, np.argsort(x)[::-1][:3], np.int64)
    check(call("Unique", np.concatenate([x, x]), outputs=1), np.sort(x), kind)
    check(call("Unique", np.concatenate([x, x]), sorted=0, outputs=1), x, kind)
    for reduction, wanted in (("max", np.maximum), ("min", np.minimum), ("none", lambda old, new: new)):
        found = call("ScatterElements", x, np.arange(8), x[::-1].copy(), reduction=reduction)
        check(found, wanted(x, x[::-1]), kind)
    check(call("Gather", x, np.array([3, -1])), x[[3, -1]], kind)
    check(call("Trilu", x.reshape(2, 4), upper=0), np.tril(x.reshape(2, 4)), kind)
    check(call("ReverseSequence", x.reshape(4, 2), np.array([4, 1])), first_reversed(x.reshape(4, 2)), kind)


def first_reversed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first of two columns upside down."""
    y = x.copy()
    y[:, 0] = y[::-1, 0].copy()
    return y


@pytest.mark.parametrize("kind", TYPES)
def test_products_of_matrices(kind: Any) -> None:
    a, b = values(kind).reshape(2, 4), values(kind)[::-1].reshape(4, 2).copy()
    with np.errstate(over="ignore"):
        wanted = a @ b
    check(call("MatMul", a, b), wanted, kind)
    check(call("Gemm", a, b), wanted, kind)
    check(call("Einsum", a, b, equation="ij,jk->ik"), wanted, kind)
