"""ONNX form of softmax attention within blocks: a model-local function of primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention_parts import as_number, blocks_of, counted, number_of, operands, turned
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers
from graphopt.ops.block_attention import TINY

# Larger than any score, and finite.
_HIDDEN = -1e30


@lowers("graphopt::block_attention")
def _block_attention(call: Call) -> str:
    """Blocks beside each other [B, Hkv, G, N, C, C]; one short block where there are fewer tokens."""
    need(call.builder.opset >= 13, "block attention below opset 13, whose Softmax flattens")
    given = operands(call, ("q", "k", "v", "key_weight"))
    size, causal, scale = call.get(4, "block", 64), call.get(5, "causal", False), call.get(6, "scale", 1.0)
    keys, wide = given.shapes["k"][1], given.wide
    heads = keys, given.shapes["q"][1] // keys
    merged = (0, heads[0] * heads[1], -1, given.shapes["v"][3])

    def body(b: Builder, inputs: list[str]) -> str:
        x = given.widened(b, inputs)
        count = number_of(b, x["q"], 2)
        step = str(b.op("Min", count, b.number(size)))
        within = counted(b, step)
        places = b.op("Add", b.unsqueeze(str(b.op("Range", b.number(0), count, step)), 1), within)  # [N, C]
        taken = str(b.op("Min", places, b.op("Sub", count, b.number(1))))
        # Every query sees the first key of its block, so no row of the mask is -inf throughout.
        seen = b.unsqueeze(str(b.op("Less", places, count)), 1)  # [N, 1, C]
        if causal:
            later = b.op("Less", b.unsqueeze(within, 1), b.unsqueeze(within, 0))
            seen = str(b.op("And", seen, b.op("Not", later)))
        mask = str(b.op("Where", seen, b.number(0, wide), b.number(-torch.inf, wide)))
        q = blocks_of(b, b.op("Mul", x["q"], b.number(scale, wide)), taken, heads)
        k, v = (blocks_of(b, x[name], taken, (keys, 1)) for name in "kv")
        weight = blocks_of(b, x["key_weight"], taken, (1, 1)) if "key_weight" in x else ""
        out = _softmax(b, (q, k, v), mask, weight, wide)
        flat = b.op("Reshape", out, b.ints(*merged))
        out = b.op("Slice", flat, b.ints(0), b.unsqueeze(count, 0), b.ints(2))
        return b.cast(out, given.dtype) if given.dtype != wide else str(out)

    name = f"BlockAttention_{'_'.join(map(str, (*heads, merged[3], size, int(causal), scale)))}{given.suffix}"
    return str(call.builder.function(name, given.values, body))


def _softmax(b: Builder, blocks: tuple[str, str, str], mask: str, weight: str, wide: torch.dtype) -> str:
    """softmax(q k^T + mask) v; a key's weight goes to its value, and to the sum that the result is divided by.

    A weight of 0 hides by a large number: where nothing else is visible, the softmax falls on hidden keys, whose
    weighted values are 0.
    """
    q, k, v = blocks
    scores = b.op("Add", b.op("MatMul", q, turned(b, k, 6)), mask)
    if not weight:
        return str(b.op("MatMul", b.op("Softmax", scores, axis=-1), v))
    unseen = as_number(b, str(b.op("Equal", turned(b, weight, 6), b.number(0, wide))), wide)
    scores = b.op("Add", scores, b.op("Mul", unseen, b.number(_HIDDEN, wide)))
    weights = b.op("Softmax", scores, axis=-1)
    mass = b.op("Max", b.op("MatMul", weights, weight), b.number(TINY, wide))
    return str(b.op("Div", b.op("MatMul", weights, b.op("Mul", v, weight)), mass))
