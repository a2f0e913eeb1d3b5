"""ONNX form of Gaussian attention through landmarks: a model-local function of primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention_parts import operands, repeat_heads, turned
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers
from graphopt.ops.landmark_attention import SHIFT, STEPS, TINY


@lowers("graphopt::landmark_attention")
def _landmark_attention(call: Call) -> str:
    """Matrix products alone: landmarks, three kernels, and Newton's steps one after the other."""
    need(call.builder.opset >= 11, "landmark attention below opset 11, which has no CumSum")
    given, count = operands(call, ("q", "k", "v", "key_weight")), call.get(4, "landmarks", 49)
    groups, wide = given.shapes["q"][1] // given.shapes["k"][1], given.wide

    def body(b: Builder, inputs: list[str]) -> str:
        x = given.widened(b, inputs)
        q, k, v = x["q"], x["k"], x["v"]
        if "key_weight" in x:
            weight = x["key_weight"]
            v = str(b.op("Mul", v, weight))
        else:
            weight = _ones(b, k, wide)
        centres = _segment_means(b, k, weight, count, wide)
        held = b.op("MatMul", _kernel(b, centres, k, wide), v)
        held = _solve(b, _kernel(b, centres, centres, wide), str(held), count, wide)
        centres, held = (repeat_heads(b, y, groups) for y in (centres, held))
        out = b.op("MatMul", _kernel(b, q, centres, wide), held)
        return b.cast(out, given.dtype) if given.dtype != wide else str(out)

    name = f"LandmarkAttention_groups{groups}_{count}{given.suffix}"
    return str(call.builder.function(name, given.values, body))


def _ones(b: Builder, k: str, wide: torch.dtype) -> str:
    """[1, 1, S, 1]."""
    shape = b.op("Concat", b.ints(1, 1), b.size(k, 2), b.ints(1), axis=0)
    return str(b.op("Expand", b.number(1, wide), shape))


def _segment_means(b: Builder, k: str, weight: str, count: int, wide: torch.dtype) -> str:
    """Means over segments of equal weight [B, Hkv, count, D]."""
    end = b.op("CumSum", weight, b.number(2))
    size = b.op("Div", b.sum(weight, 2), b.number(count, wide))  # [B or 1, 1, 1, 1]
    places = torch.arange(count + 1, dtype=wide)
    first, last = (b.op("Mul", size, b.constant(x, "places")) for x in (places[:-1], places[1:]))
    share = b.op("Sub", b.op("Min", end, last), b.op("Max", b.op("Sub", end, weight), first))
    share = b.op("Max", share, b.number(0, wide))
    return str(b.op("Div", b.op("MatMul", turned(b, share, 4), k), b.op("Max", size, b.number(TINY, wide))))


def _kernel(b: Builder, left: str, right: str, wide: torch.dtype) -> str:
    """exp(-|a_i - b_j|^2 / 2)."""
    half = b.number(0.5, wide)
    rows, columns = (b.op("Mul", half, b.sum(str(b.op("Mul", y, y)), 3)) for y in (left, right))
    exponents = b.op("Sub", b.op("MatMul", left, turned(b, right, 4)), rows)
    return str(b.op("Exp", b.op("Sub", exponents, turned(b, str(columns), 4))))


def _solve(b: Builder, gram: str, right: str, count: int, wide: torch.dtype) -> str:
    """(gram + 0.01 I)^-1 right by Newton's iteration from a multiple of I, and one step of refinement."""
    eye = torch.eye(count, dtype=wide)
    shifted = b.op("Add", gram, b.constant(SHIFT * eye, "shift"))
    rows = turned(b, b.sum(str(shifted), 3), 4)
    found, twice = b.op("Div", b.constant(eye, "identity"), b.largest(rows)), b.constant(2 * eye, "twice")
    for _ in range(STEPS):
        found = b.op("MatMul", found, b.op("Sub", twice, b.op("MatMul", shifted, found)))
    first = b.op("MatMul", found, right)
    rest = b.op("Sub", right, b.op("MatMul", shifted, first))
    return str(b.op("Add", first, b.op("MatMul", found, rest)))
