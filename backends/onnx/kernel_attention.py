"""ONNX form of kernel attention over all keys: a model-local function of primitive operators."""

from __future__ import annotations

from graphopt.backends.onnx.attention_parts import operands, repeat_heads
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers


@lowers("graphopt::kernel_attention")
def _kernel_attention(call: Call) -> str:
    """phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1): two products with a [K, V] matrix, no [T, S] matrix."""
    given, eps = operands(call, ("q", "k", "v", "key_weight")), call.get(4, "eps", 1e-6)
    groups, wide = given.shapes["q"][1] // given.shapes["k"][1], given.wide

    def body(b: Builder, names: list[str]) -> str:
        q, k, v, *rest = given.widened(b, names).values()
        weight = rest[0] if rest else ""
        if weight and groups > 1:
            k, weight = b.op("Mul", k, weight), ""
        k, v = repeat_heads(b, k, groups), repeat_heads(b, v, groups)
        out, total = _sums(b, q, k, v, weight)
        out = b.op("Div", out, b.op("Add", total, b.number(eps, wide)))
        return b.cast(out, given.dtype) if given.dtype != wide else str(out)

    name = f"KernelAttention_groups{groups}_eps{eps!r}{given.suffix}"
    return str(call.builder.function(name, given.values, body))


def _sums(b: Builder, q: str, k: str, v: str, weight: str) -> tuple[str, str]:
    """Numerator and denominator; a key's weight goes to its value, which is narrower than its features."""
    keys = b.op("Transpose", k, perm=[0, 1, 3, 2])
    values = b.op("Mul", v, weight) if weight else v
    out = b.op("MatMul", q, b.op("MatMul", keys, values))
    sums = b.op("MatMul", keys, weight) if weight else b.op("Transpose", b.sum(k, 2), perm=[0, 1, 3, 2])
    return out, b.op("MatMul", q, sums)
