"""ONNX forms of the linear attention operators: model-local functions of primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers, shape_of


def _suffix(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lowers("graphopt::hedgehog_map")
def _hedgehog_map(call: Call) -> str:
    """One product with [W, -W] side by side, then the activation over each half.

    Computing both signs in one MatMul and viewing the result as [.., 2, F] needs neither a copy of the features nor
    a second pass over x.
    """
    bias, activation = call.get(2, "bias"), call.get(3, "activation", "softmax")
    features = shape_of(call.node)[-1] // 2
    dtype = call.dtype()

    def body(b: Builder, inputs: list[str]) -> str:
        x, weight, *shift = (b.cast(i, torch.float32) if dtype.itemsize < 4 else i for i in inputs)
        projected = b.op("MatMul", x, _both_signs(b, weight))
        if shift:
            projected = b.op("Add", projected, _both_signs(b, shift[0]))
        if activation == "exp":
            out = b.op("Exp", projected)
        else:
            signs = b.op("Reshape", projected, b.ints(0, 0, 0, 2, features))
            out = b.op("Reshape", b.op("Softmax", signs, axis=4), b.ints(0, 0, 0, 2 * features))
        return b.cast(out, dtype) if dtype.itemsize < 4 else str(out)

    name = f"HedgehogMap_{activation}_{features}_{'biased_' if bias else ''}{_suffix(dtype)}"
    return call.builder.function(name, [*call.args[:2], *([bias] if bias else [])], body)


def _both_signs(b: Builder, weight: str) -> str:
    """[W, -W]; depends on constants only, so runtimes fold it when they load the model."""
    return str(b.op("Concat", weight, b.op("Neg", weight), axis=2))


@lowers("graphopt::linear_attention")
def linear_attention(call: Call) -> str:
    """phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1): two products with a [K, V] matrix, no [T, S] matrix.

    The causal form has the same value as a masked product of the features; it is quadratic in the length, because
    standard ONNX has no operator that carries a state except Scan, which runs token by token.
    """
    key_weight, causal = call.get(3, "key_weight"), call.get(4, "causal", False)
    normalize, eps = call.get(5, "normalize", True), call.get(6, "eps", 1e-6)
    dtype = call.dtype(2)
    groups = groups_of(call)
    inputs = [*call.args[:3]] + ([key_weight] if key_weight else [])

    def body(b: Builder, names: list[str]) -> str:
        q, k, v = (b.cast(i, torch.float32) if dtype.itemsize < 4 else i for i in names[:3])
        weight = names[3] if key_weight else ""
        if weight and dtype.itemsize < 4:
            weight = b.cast(weight, torch.float32)
        if weight and (groups > 1 or causal):
            k, weight = b.op("Mul", k, weight), ""
        if groups > 1:
            k, v = _repeat(b, k, groups), _repeat(b, v, groups)
        wide = torch.promote_types(dtype, torch.float32)
        out, total = _causal(b, q, k, v, wide) if causal else _bidirectional(b, q, k, v, weight)
        if normalize:
            out = b.op("Div", out, b.op("Add", total, b.constant(torch.tensor(eps, dtype=wide), "eps")))
        return b.cast(out, dtype) if dtype.itemsize < 4 else str(out)

    parts = ["LinearAttention", "causal" if causal else "", f"groups{groups}" if groups > 1 else ""]
    parts += [
        "" if normalize else "unnormalized",
        "weighted" if key_weight else "",
        f"eps{eps:g}",
        _suffix(dtype),
    ]
    return call.builder.function("_".join(filter(None, parts)), inputs, body)


def _bidirectional(b: Builder, q: str, k: str, v: str, weight: str) -> tuple[str, str]:
    """Numerator and denominator; a key's weight goes to its value, which is narrower than its features."""
    keys = b.op("Transpose", k, perm=[0, 1, 3, 2])
    values = b.op("Mul", v, weight) if weight else v
    out = b.op("MatMul", q, b.op("MatMul", keys, values))
    sums = b.op("MatMul", keys, weight) if weight else b.op("Transpose", b.sum(k, 2), perm=[0, 1, 3, 2])
    return out, b.op("MatMul", q, sums)


def _causal(b: Builder, q: str, k: str, v: str, dtype: torch.dtype) -> tuple[str, str]:
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    queries, keys = (b.squeeze(b.slice(b.op("Shape", x), 0, 2, 3), 0) for x in (q, k))
    offset = b.op("Sub", keys, queries)
    visible = b.op("Trilu", scores, offset, upper=0) if b.opset >= 14 else _lower(b, scores, keys, offset, dtype)
    return b.op("MatMul", visible, v), b.sum(visible, 3)


def _lower(b: Builder, scores: str, keys: str, offset: str, dtype: torch.dtype) -> str:
    """What Trilu does, from before it came: keep a score where the key's position is not behind the query's."""
    need(b.opset >= 11, "causal linear attention below opset 11, which has no Range")
    zero, one = (b.constant(torch.tensor(n), "number") for n in (0, 1))
    key_at = b.unsqueeze(b.op("Range", zero, keys, one), 0)
    query_at = b.unsqueeze(b.op("Range", offset, keys, one), 1)
    visible = b.op("Not", b.op("Less", query_at, key_at))
    return str(b.op("Where", visible, scores, b.constant(torch.tensor(0, dtype=dtype), "hidden")))


def _repeat(b: Builder, value: str, groups: int) -> str:
    """[B, Hkv, S, K] -> [B, Hkv * groups, S, K], each head beside its copies."""
    wide = b.op("Expand", b.unsqueeze(value, 2), b.ints(1, 1, groups, 1, 1))
    shape = b.op("Shape", value)
    full = b.op("Concat", b.slice(shape, 0, 0, 1), b.ints(-1), b.slice(shape, 0, 2, 4), axis=0)
    return str(b.op("Reshape", wide, full))


def groups_of(call: Call) -> int:
    """Query heads per key head, as observed on the example."""
    return shape_of(call.node.args[0])[1] // shape_of(call.node.args[1])[1]
