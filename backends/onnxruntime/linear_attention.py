"""Causal linear attention as `com.microsoft::LinearAttention`, which has kernels on CPU and CUDA."""

from __future__ import annotations

import torch

from graphopt.backends.onnx import linear_attention as standard
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers, shape_of

_CONTRIB = "com.microsoft"


@lowers("graphopt::linear_attention", target="onnxruntime")
def _linear_attention(call: Call) -> str:
    """The contrib operator is causal and does not normalise: a column of ones beside v sums the weights.

    The bidirectional form keeps its two products, which no contrib operator beats.
    """
    if not call.get(4, "causal", False):
        return standard.linear_attention(call)
    key_weight, normalize = call.get(3, "key_weight"), call.get(5, "normalize", True)
    eps, dtype = call.get(6, "eps", 1e-6), call.dtype(2)
    heads, groups = shape_of(call.node.args[0])[1], standard.groups_of(call)
    width = shape_of(call.node.args[2])[3]

    def body(b: Builder, names: list[str]) -> str:
        q, k, v = (b.cast(i, torch.float32) if dtype.itemsize < 4 else i for i in names[:3])
        if key_weight:
            k = b.op("Mul", k, b.cast(names[3], torch.float32) if dtype.itemsize < 4 else names[3])
        wide = torch.promote_types(dtype, torch.float32)
        if normalize:
            ones = b.op("Expand", _number(b, 1, wide), b.op("Shape", b.slice(v, 3, 0, 1)))
            v = b.op("Concat", v, ones, axis=3)
        packed = [_pack(b, x) for x in (q, k, v)]
        out, _ = b.op(
            "LinearAttention",
            *packed,
            domain=_CONTRIB,
            outputs=2,
            q_num_heads=heads,
            kv_num_heads=heads // groups,
            update_rule="linear",
            scale=1.0,
        )
        out = b.op("Reshape", out, b.ints(0, 0, heads, width + int(normalize)))
        out = b.op("Transpose", out, perm=[0, 2, 1, 3])
        if normalize:
            total = b.op("Add", b.slice(out, 3, width, width + 1), _number(b, eps, wide))
            out = b.op("Div", b.slice(out, 3, 0, width), total)
        return b.cast(out, dtype) if dtype.itemsize < 4 else str(out)

    inputs = [*call.args[:3], *([key_weight] if key_weight else [])]
    parts = [
        "CausalLinearAttention",
        f"{heads}_{heads // groups}_{width}",
        "" if normalize else "unnormalized",
    ]
    parts += ["weighted" if key_weight else "", f"eps{eps:g}", str(dtype).removeprefix("torch.")]
    return call.builder.function("_".join(filter(None, parts)), inputs, body)


def _number(b: Builder, value: float, dtype: torch.dtype) -> str:
    return b.constant(torch.tensor(value, dtype=dtype), "number")


def _pack(b: Builder, value: str) -> str:
    """[B, H, T, K] -> [B, T, H K]."""
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(b.op("Reshape", turned, b.ints(0, 0, -1)))
