"""ONNX form of causal linear attention: chunks of tokens for the rule `linear`, Scan over tokens for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.backends.onnx.attention_parts import BLOCK, blocks_of, number_of, operands, running_sum, turned
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers

NAMES = ("q", "k", "v", "decay", "beta", "state")


@dataclass(frozen=True)
class Heads:
    """Static sizes: heads of the state, queries for each, width of features and values."""

    states: int
    groups: int
    features: int
    values: int
    wide: torch.dtype


@lowers("graphopt::linear_attention")
def linear_attention(call: Call) -> list[str]:
    """The output and the last state, in time linear in T."""
    need(call.builder.opset >= 13, "linear attention below opset 13")
    given = operands(call, NAMES)
    rule, scale = call.get(6, "rule", "linear"), call.get(7, "scale", 1.0)
    count = given.shapes["k"][1]
    heads = Heads(count, given.shapes["q"][1] // count, given.shapes["k"][3], given.shapes["v"][3], given.wide)

    def body(b: Builder, inputs: list[str]) -> list[str]:
        x = given.widened(b, inputs)
        out, state = (_chunked if rule == "linear" else _scanned)(b, x, heads)
        if scale != 1:
            out = b.op("Mul", out, b.number(scale, heads.wide))
        return [b.cast(out, given.dtype) if given.dtype != heads.wide else out, state]

    name = f"LinearAttention_{rule}_{'_'.join(map(str, (*_sizes(heads), scale)))}{given.suffix}"
    found: list[str] = call.builder.function(name, given.values, body, outputs=2)
    return found


def _sizes(heads: Heads) -> tuple[int, ...]:
    return heads.states, heads.groups, heads.features, heads.values


def _chunked(b: Builder, x: dict[str, str], heads: Heads) -> tuple[str, str]:
    """Chunks of BLOCK tokens, or one of all tokens where they are fewer."""
    count = number_of(b, x["q"], 2)
    size = b.op("Min", count, b.number(BLOCK))
    within = b.op("Range", b.number(0), size, b.number(1))
    places = b.op("Add", b.unsqueeze(b.op("Range", b.number(0), count, size), 1), within)  # [N, C]
    taken = str(b.op("Min", places, b.op("Sub", count, b.number(1))))
    there = b.unsqueeze(b.cast(str(b.op("Less", places, count)), heads.wide), 2)  # [N, C, 1]
    q = blocks_of(b, x["q"], taken, (heads.states, heads.groups))
    k, v = (blocks_of(b, x[name], taken, (heads.states, 1)) for name in "kv")
    # What fills the last chunk up must not enter the state.
    v = b.op("Mul", v, there)
    causal = b.op("Not", b.op("Less", b.unsqueeze(within, 1), b.unsqueeze(within, 0)))
    out, state = _additive(b, q, k, str(v), b.cast(str(causal), heads.wide), x.get("state"))
    flat = b.op("Reshape", out, b.ints(0, heads.states * heads.groups, -1, heads.values))
    return str(b.op("Slice", flat, b.ints(0), b.unsqueeze(count, 0), b.ints(2))), state


def _additive(b: Builder, q: str, k: str, v: str, causal: str, state: str | None) -> tuple[str, str]:
    """The rule `linear` on chunks: a masked product within each, a running sum of k^T v between them.

    Args:
        b: where the nodes go.
        q: queries [B, Hkv, G, N, C, K].
        k: keys [B, Hkv, 1, N, C, K].
        v: values [B, Hkv, 1, N, C, V].
        causal: 1 where a token [C, 1] sees a key [1, C], else 0.
        state: before the first chunk [B, Hkv, K, V].

    Returns:
        The output in the layout of q, and the last state in that of `state`.
    """
    weights = b.op("Mul", b.op("MatMul", q, turned(b, k, 6)), causal)
    added = b.op("MatMul", turned(b, k, 6), v)
    shape = b.op("Shape", added)
    if state is not None:
        first = b.op("Concat", b.slice(shape, 0, 0, 3), b.ints(1), b.slice(shape, 0, 4, 6), axis=0)
        state = str(b.op("Reshape", state, first))
    before, last = running_sum(b, str(added), state)
    out = b.op("Add", b.op("MatMul", weights, v), b.op("MatMul", q, before))
    joined = b.op("Concat", b.slice(shape, 0, 0, 1), b.ints(-1), b.slice(shape, 0, 4, 6), axis=0)
    return str(out), str(b.op("Reshape", last, joined))


def _scanned(b: Builder, x: dict[str, str], heads: Heads) -> tuple[str, str]:
    """One token at a time: ONNX has no other operator that carries a state."""
    q = b.op("Reshape", x["q"], b.ints(0, heads.states, heads.groups, -1, heads.features))
    sides = {"q": (q, 3), "key": (b.unsqueeze(x["k"], 4), 2), "value": (b.unsqueeze(x["v"], 3), 2)}
    if "beta" in x:
        sides |= {"row": (b.unsqueeze(x["k"], 3), 2), "beta": (b.unsqueeze(x["beta"], 4), 2)}
    if "decay" in x:
        sides["factor"] = (b.unsqueeze(str(b.op("Exp", x["decay"])), 4), 2)
    state = x.get("state")
    if state is None:
        batch = b.slice(str(b.op("Shape", x["k"])), 0, 0, 1)
        shape = b.op("Concat", batch, b.ints(heads.states, heads.features, heads.values), axis=0)
        state = str(b.op("Expand", b.number(0, heads.wide), shape))

    def step(i: Builder, inputs: list[str]) -> list[str]:
        state, given = inputs[0], dict(zip(sides, inputs[1:], strict=True))
        value = given["value"]
        if "factor" in given:
            state = i.op("Mul", given["factor"], state)
        if "beta" in given:
            value = i.op("Mul", given["beta"], i.op("Sub", value, i.op("MatMul", given["row"], state)))
        state = i.op("Add", state, i.op("Mul", given["key"], value))
        return [state, i.op("MatMul", given["q"], state)]

    body = b.graph("token", step, ["state", *sides], heads.wide)
    last, out = b.op(
        "Scan",
        state,
        *(value for value, _ in sides.values()),
        outputs=2,
        body=body,
        num_scan_inputs=len(sides),
        scan_input_axes=[axis for _, axis in sides.values()],
        scan_output_axes=[3],
    )
    return str(b.op("Reshape", out, b.ints(0, heads.states * heads.groups, -1, heads.values))), str(last)
