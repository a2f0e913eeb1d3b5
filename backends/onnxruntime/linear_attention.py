"""Causal linear attention as `com.microsoft::LinearAttention`, which has kernels on CPU and CUDA."""

from __future__ import annotations

import torch

from graphopt.backends.onnx import linear_attention as standard
from graphopt.backends.onnx.attention_parts import operands
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers

_CONTRIB = "com.microsoft"


@lowers("graphopt::linear_attention", target="onnxruntime")
def _linear_attention(call: Call) -> list[str]:
    """One contrib operator on packed operands [B, T, H K]; it has no kernel for fp64."""
    given = operands(call, standard.NAMES)
    if given.wide != torch.float32:
        return standard.linear_attention(call)
    rule, scale = call.get(6, "rule", "linear"), call.get(7, "scale", 1.0)
    (_, queries, _, _), (_, keys, _, _) = given.shapes["q"], given.shapes["k"]
    width = given.shapes["v"][3]

    def body(b: Builder, inputs: list[str]) -> list[str]:
        x = given.widened(b, inputs)
        for name in ("decay", "beta"):
            if name in x and given.shapes[name][0] == 1:  # one for all of a batch, which the operator does not take
                shape = b.op("Concat", b.slice(b.op("Shape", x["k"]), 0, 0, 1), b.ints(1, 1, 1), axis=0)
                x[name] = b.op("Expand", x[name], shape)
        packed = {name: _pack(b, value) for name, value in x.items() if name != "state"}
        out, state = b.op(
            "LinearAttention",
            *(packed[name] for name in "qkv"),
            x.get("state", ""),
            packed.get("decay", ""),
            packed.get("beta", ""),
            domain=_CONTRIB,
            outputs=2,
            q_num_heads=queries,
            kv_num_heads=keys,
            update_rule=rule,
            # The operator reads 0 as 1 / sqrt(K).
            scale=float(scale) or 1.0,
        )
        out = b.op("Reshape", out, b.ints(0, 0, queries, width))
        out = b.op("Transpose", out, perm=[0, 2, 1, 3])
        if scale == 0:
            out = b.op("Mul", out, b.number(0, given.wide))
        return [b.cast(out, given.dtype) if given.dtype != given.wide else out, state]

    name = f"PackedLinearAttention_{rule}_{queries}_{keys}_{width}_{scale}{given.suffix}"
    found: list[str] = call.builder.function(name, given.values, body, outputs=2)
    return found


def _pack(b: Builder, value: str) -> str:
    """[B, H, T, K] -> [B, T, H K]."""
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(b.op("Reshape", turned, b.ints(0, 0, -1)))
