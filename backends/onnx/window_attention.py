"""ONNX form of softmax attention over a window: rows of all keys for few queries, blocks of queries for many.

The weights come from one Softmax. Its largest value in a row is exp(0) / sum, the inverse of the row's sum of
exponentials, which is all that a common denominator with another kind of attention needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch

from graphopt.backends.onnx.attention_parts import (
    BLOCK,
    Operands,
    blocks_of,
    counted,
    number_of,
    operands,
    turned,
)
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers
from graphopt.ops.window_attention import TINY

# Larger than any score, and finite.
_HIDDEN = -1e30


@dataclass(frozen=True)
class Plan:
    """What is static about the attention.

    Attributes:
        heads: of the keys, and queries for each.
        widths: of q and k, and of v.
        window: keys that a query sees besides the sinks.
        sinks: first keys that every later query sees.
        scale: factor on q k^T.
        wide: the type to compute in.
    """

    heads: tuple[int, int]
    widths: tuple[int, int]
    window: int
    sinks: int
    scale: float
    wide: torch.dtype

    @property
    def scales_scores(self) -> bool:
        """Whether the scale stands behind q k^T, where onnxruntime joins it with the product, as fp32; else on q."""
        return self.scale != 1 and self.wide == torch.float32

    def scaled(self, b: Builder, q: str) -> str:
        """q, or q times the scale."""
        if self.scale == 1 or self.scales_scores:
            return q
        return str(b.op("Mul", q, self.scalar(b, self.scale)))

    def scalar(self, b: Builder, value: float) -> str:
        """A constant in the type to compute in."""
        return b.number(value, self.wide)

    def merged(self, b: Builder, value: str, queries: str) -> str:
        """[B, Hkv, G, .., V] -> [B, H, T, V]: rows behind the last query, which fill the last block, are dropped."""
        flat = b.op("Reshape", value, b.ints(0, self.heads[0] * self.heads[1], -1, self.widths[1]))
        return str(b.op("Slice", flat, b.ints(0), b.unsqueeze(queries, 0), b.ints(2)))


@dataclass(frozen=True)
class Span:
    """Sizes that are known when the model runs: T queries behind P = S - T cached keys, as scalars."""

    queries: str
    keys: str
    past: str

    @classmethod
    def of(cls, b: Builder, q: str, k: str) -> Span:
        """The sizes of q [B, H, T, D] and k [B, Hkv, S, D]."""
        queries, keys = number_of(b, q, 2), number_of(b, k, 2)
        return cls(queries, keys, str(b.op("Sub", keys, queries)))


@dataclass(frozen=True)
class Weights:
    """Softmax over the visible keys, times the weight of each where keys have one.

    Attributes:
        values: [.., S].
        mass: their sum [.., 1], without `key_weight` 1: then None.
        largest: the largest without `key_weight`; the sum of exponentials is its inverse [.., 1].
    """

    values: str
    mass: str | None
    largest: str

    def times(self, b: Builder, v: str) -> Near:
        """Attention with values v [.., S, V]."""
        return Near(str(b.op("MatMul", self.values, v)), self.mass, self.largest)


@dataclass(frozen=True)
class Near:
    """Attention to the visible keys of the window and the sinks.

    Attributes:
        product: weights times values [.., V].
        mass: sum of the weights, without `key_weight` 1: then None.
        largest: the largest of the weights; the sum of exponentials is its inverse [.., 1].
    """

    product: str
    mass: str | None
    largest: str


def plan_of(call: Call, given: Operands, first: int) -> Plan:
    """The static part; window, sinks and scale stand at `first` in the operator's schema."""
    need(call.builder.opset >= 13, "window attention below opset 13, whose Softmax flattens")
    heads, keys = given.shapes["q"][1], given.shapes["k"][1]
    widths = given.shapes["k"][3], given.shapes["v"][3]
    window, sinks, scale = (
        call.get(first + i, name, default)
        for i, (name, default) in enumerate((("window", 64), ("sinks", 0), ("scale", 1.0)))
    )
    return Plan((keys, heads // keys), widths, window, sinks, scale, given.wide)


@lowers("graphopt::window_attention")
def _window_attention(call: Call) -> str:
    """softmax(scale q k^T) v over a window; time and memory grow with T, and with the window only for T = 1."""
    given = operands(call, ("q", "k", "v", "key_weight"))
    plan = plan_of(call, given, 4)

    def body(b: Builder, inputs: list[str]) -> str:
        x = given.widened(b, inputs)
        if not plan.window and not plan.sinks:  # no query sees anything
            rows, width = b.slice(b.op("Shape", x["q"]), 0, 0, 3), b.ints(plan.widths[1])
            out = b.op("Expand", plan.scalar(b, 0), b.op("Concat", rows, width, axis=0))
        else:
            span = Span.of(b, x["q"], x["k"])
            short = b.graph("few", lambda i, _: _answer(i, rows_near(i, x, span, plan), span, plan), dtype=plan.wide)
            long = b.graph("many", lambda i, _: _answer(i, blocks_near(i, x, span, plan), span, plan), dtype=plan.wide)
            (out,) = few_or_many(b, span, short, long)
        return b.cast(out, given.dtype) if given.dtype != plan.wide else str(out)

    name = f"WindowAttention_{'_'.join(map(str, (*plan.heads, *plan.widths, plan.window, plan.sinks, plan.scale)))}"
    return str(call.builder.function(f"{name}{given.suffix}", given.values, body))


def few_or_many(b: Builder, span: Span, short: onnx.GraphProto, long: onnx.GraphProto) -> list[str]:
    """One branch where all queries fit into a block, the other one where they do not."""
    fits = b.op("Not", b.op("Greater", span.queries, b.number(BLOCK)))
    outputs = len(short.output)
    found = b.op("If", fits, then_branch=short, else_branch=long, outputs=outputs)
    return list(found) if outputs > 1 else [str(found)]


def _answer(b: Builder, near: Near, span: Span, plan: Plan) -> str:
    out = near.product
    if near.mass is not None:  # rows without visible keys have zeros above and below
        out = str(b.op("Div", out, b.op("Max", near.mass, plan.scalar(b, TINY))))
    return plan.merged(b, out, span.queries)


def rows_near(b: Builder, x: dict[str, str], span: Span, plan: Plan) -> Near:
    """Scores of each query with all keys [B, Hkv, G, T, S], which few queries and a short cache allow."""
    q = b.op("Reshape", plan.scaled(b, x["q"]), b.ints(0, *plan.heads, -1, plan.widths[0]))
    at = b.unsqueeze(counted(b, span.keys, span.past), 1)
    keys = b.unsqueeze(counted(b, span.keys), 0)
    weight = b.unsqueeze(x["key_weight"], 2) if "key_weight" in x else None
    weights = weights_of(b, q, b.unsqueeze(x["k"], 2), _visible(b, at, keys, plan), weight, plan, 5)
    return weights.times(b, b.unsqueeze(x["v"], 2))


def blocks_near(b: Builder, x: dict[str, str], span: Span, plan: Plan) -> Near:
    """Each block of queries with its own keys, the window before it and the sinks."""
    weights, taken = block_weights(b, x, span, plan, block_starts(b, span.queries))
    return weights.times(b, blocks_of(b, x["v"], taken, (plan.heads[0], 1)))


def block_weights(b: Builder, x: dict[str, str], span: Span, plan: Plan, start: str) -> tuple[Weights, str]:
    """Weights [B, Hkv, G, N, C, M] on the window before each block, its own keys and the sinks, in this order.

    Args:
        b: where the nodes go.
        x: the operands.
        span: their sizes.
        plan: what is static.
        start: the first query of each block [N, 1].

    Returns:
        The weights, and the places of the keys [N, M]; one that does not exist counts as the nearest, with weight 0.
    """
    q = blocks_of(b, plan.scaled(b, x["q"]), inside(b, places(b, start, 0, BLOCK), span.queries), plan.heads)
    start = str(b.op("Add", start, span.past))
    masks, taken = [], []
    if plan.window:
        window = places(b, start, -plan.window, BLOCK)  # [N, M]
        outside = b.unsqueeze(str(b.op("Less", window, b.number(plan.sinks))), 1)
        edge = b.op("Where", outside, plan.scalar(b, -torch.inf), plan.scalar(b, 0))
        masks.append(b.op("Add", edge, _band(b, plan)))
        taken.append(window)
    if plan.sinks:
        at = b.unsqueeze(places(b, start, 0, BLOCK), 2)  # [N, C, 1]
        first = _row(b, 0, plan.sinks)
        masks.append(_hidden(b, b.op("Not", b.op("Greater", first, at)), plan))
        taken.append(b.op("Add", b.op("Mul", start, b.number(0)), first))
    mask, keys = (b.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0] for parts in (masks, taken))
    keys = inside(b, keys, span.keys)
    k = blocks_of(b, x["k"], keys, (plan.heads[0], 1))
    weight = blocks_of(b, x["key_weight"], keys, (1, 1)) if "key_weight" in x else None
    return weights_of(b, q, k, mask, weight, plan, 6), keys


def block_starts(b: Builder, count: str) -> str:
    """The first of each block of `count` queries [N, 1]."""
    return b.unsqueeze(str(b.op("Range", b.number(0), count, b.number(BLOCK))), 1)


def places(b: Builder, start: str, first: int, end: int) -> str:
    """Places relative to the start of each block: [N, end - first]."""
    return str(b.op("Add", start, _row(b, first, end)))


def inside(b: Builder, taken: str, count: str) -> str:
    """Places in 0 .. count - 1; what a place outside stands for is hidden elsewhere."""
    low = b.op("Max", taken, b.number(0))
    return str(b.op("Min", low, b.op("Sub", count, b.number(1))))


def _row(b: Builder, start: int, end: int) -> str:
    return b.constant(torch.arange(start, end).unsqueeze(0), "places")


def _band(b: Builder, plan: Plan) -> str:
    """0 where row i of a block sees column m, which counts from `window` before the block, else -inf [C, M].

    Depends on constants only, so runtimes compute it when they load the model.
    """
    apart = b.op("Sub", _row(b, 0, plan.window + BLOCK), b.unsqueeze(b.constant(torch.arange(BLOCK), "places"), 1))
    seen = b.op("And", b.op("Greater", apart, b.number(0)), b.op("Less", apart, b.number(plan.window + 1)))
    return _hidden(b, seen, plan)


def _visible(b: Builder, at: str, keys: str, plan: Plan) -> str:
    """0 where the query at `at` [T, 1] sees the key [1, S], else -inf."""
    visible = b.op("Less", b.op("Sub", at, keys), b.number(plan.window))
    if plan.sinks:
        visible = b.op("Or", visible, b.op("Less", keys, b.number(plan.sinks)))
    return _hidden(b, b.op("And", visible, b.op("Not", b.op("Greater", keys, at))), plan)


def _hidden(b: Builder, visible: str, plan: Plan) -> str:
    return str(b.op("Where", visible, plan.scalar(b, 0), plan.scalar(b, -torch.inf)))


def weights_of(b: Builder, q: str, k: str, mask: str, weight: str | None, plan: Plan, rank: int) -> Weights:
    """Softmax over the last axis of scale q k^T + mask [.., S], from `Plan.scaled` q; `weight` of each key [.., S, 1].

    Every query sees its own key, so no row of the mask is -inf throughout. A weight of 0 hides by a large number
    instead: where nothing else is visible, the softmax falls on hidden keys, whose weight is 0.
    """
    if weight is not None:
        weight = turned(b, weight, rank)
        unseen = b.op("Equal", weight, plan.scalar(b, 0))
        mask = str(b.op("Add", mask, b.op("Where", unseen, plan.scalar(b, _HIDDEN), plan.scalar(b, 0))))
    scores = b.op("MatMul", q, turned(b, k, rank))
    if plan.scales_scores:
        scores = b.op("Mul", scores, plan.scalar(b, plan.scale))
    weights = str(b.op("Softmax", b.op("Add", scores, mask), axis=-1))
    largest = b.largest(weights)
    if weight is None:
        return Weights(weights, None, largest)
    weights = str(b.op("Mul", weights, weight))
    return Weights(weights, b.sum(weights, -1), largest)
