"""ONNX form of LoLCATs' hybrid: softmax over a window and linear attention before it, under one denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.backends.onnx.attention_parts import BLOCK, blocks_of, counted, operands, turned, with_ones
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.linear_attention import additive
from graphopt.backends.onnx.table import Call, lowers
from graphopt.backends.onnx.window_attention import (
    Near,
    Plan,
    Span,
    block_starts,
    blocks_near,
    few_or_many,
    inside,
    places,
    plan_of,
    rows_near,
)
from graphopt.ops.window_attention import TINY

_NAMES = ("q", "k", "v", "query_features", "key_features", "gate", "key_weight", "state")


@lowers("graphopt::windowed_linear_attention")
def _windowed_linear_attention(call: Call) -> list[str]:
    """The output and the state behind the window, for any number of cached keys.

    The largest softmax weight of a row is the inverse of its sum of exponentials, so it takes the linear sums to the
    scale of the softmax: y = (g p v + p_max far) / (g + p_max far_1).
    """
    given = operands(call, _NAMES)
    plan = plan_of(call, given, 8)
    hybrid = Hybrid(plan, given.shapes["key_features"][1] // plan.heads[0], given.shapes["key_features"][3])
    need(hybrid.own in (1, plan.heads[1]), "key features with other heads than q or k")

    def body(b: Builder, inputs: list[str]) -> list[str]:
        x = given.widened(b, inputs)
        span = Span.of(b, x["q"], x["k"])
        x["counts"] = hybrid.counts(b, x, span)
        short = b.graph("few", lambda i, _: hybrid.rows(i, x, span), dtype=plan.wide)
        long = b.graph("many", lambda i, _: hybrid.blocks(i, x, span), dtype=plan.wide)
        out, state = few_or_many(b, span, short, long)
        return [b.cast(out, given.dtype) if given.dtype != plan.wide else out, state]

    parts = (*plan.heads, *plan.widths, hybrid.own, hybrid.features, plan.window, plan.sinks, plan.scale)
    name = f"WindowedLinearAttention_{'_'.join(map(str, parts))}{given.suffix}"
    found: list[str] = call.builder.function(name, given.values, body, outputs=2)
    return found


@dataclass(frozen=True)
class Hybrid:
    """The linear part's share: `own` feature maps for each key head, of `features` features."""

    plan: Plan
    own: int
    features: int

    def counts(self, b: Builder, x: dict[str, str], span: Span) -> str:
        """What each key counts in the state [1 or B, 1, S, 1]: its weight, and nothing where it is a sink."""
        late = b.op("Not", b.op("Less", counted(b, span.keys), b.number(self.plan.sinks)))
        counts = b.op("Reshape", b.cast(str(late), self.plan.wide), b.ints(1, 1, -1, 1))
        return str(b.op("Mul", counts, x["key_weight"])) if "key_weight" in x else str(counts)

    def rows(self, b: Builder, x: dict[str, str], span: Span) -> list[str]:
        """Few queries: those keys that one of them has behind its window, all at once."""
        plan = self.plan
        keys, held, places = self._first(b, x, b.op("Sub", span.keys, b.number(plan.window)))
        queries = self._grouped(b, x["query_features"], plan.heads[1], self.features)
        at = b.op("Sub", counted(b, span.keys, span.past), b.number(plan.window))
        behind = b.op("Not", b.op("Less", b.unsqueeze(str(at), 1), b.unsqueeze(places, 0)))
        weights = b.op("Mul", b.op("MatMul", queries, turned(b, keys, 5)), b.cast(str(behind), plan.wide))
        far, state = b.op("MatMul", weights, held), b.op("MatMul", turned(b, keys, 5), held)
        if "state" in x:
            before = self._grouped(b, x["state"], self.own, plan.widths[1] + 1)
            far = b.op("Add", far, b.op("MatMul", queries, before))
            state = b.op("Add", state, before)
        near = rows_near(b, x, span, plan) if plan.window or plan.sinks else None
        return [self._join(b, x, span, near, self._split(b, far, 4), 5), self._ungrouped(b, state)]

    def blocks(self, b: Builder, x: dict[str, str], span: Span) -> list[str]:
        """Many queries: the block that stands `window` before theirs within a product, all earlier ones as a state."""
        plan = self.plan
        start = block_starts(b, span)
        queries = inside(b, places(b, start, 0, BLOCK), span.queries)
        shift = b.op("Sub", span.past, b.number(plan.window))
        keys = places(b, str(b.op("Add", start, shift)), 0, BLOCK)  # [N, C]
        end = b.op("Sub", span.keys, b.number(plan.window))
        there = b.op("And", b.op("Not", b.op("Less", keys, b.number(0))), b.op("Less", keys, end))
        taken = inside(b, keys, span.keys)
        counts = b.op("Gather", x["counts"], taken, axis=2)  # [1 or B, 1, N, C, 1]
        counts = b.op("Mul", counts, b.unsqueeze(b.cast(str(there), plan.wide), 2))
        counts = b.unsqueeze(str(counts), 1)
        v = str(b.op("Mul", blocks_of(b, x["v"], taken, (plan.heads[0], 1)), counts))
        q = blocks_of(b, x["query_features"], queries, plan.heads)
        k = blocks_of(b, x["key_features"], taken, (plan.heads[0], self.own))
        causal = b.constant(_triangle(plan), "causal")
        # Two products rather than one with a column more: widths that are no multiple of 8 cost a quarter.
        early = self._split(b, self._early(b, x, str(shift)), 3)
        (out, values), (total, ones) = additive(b, q, k, [v, counts], causal, early)
        near = blocks_near(b, x, span, plan) if plan.window or plan.sinks else None
        return [self._join(b, x, span, near, (out, total), 6), str(b.op("Concat", values, ones, axis=3))]

    def _early(self, b: Builder, x: dict[str, str], shift: str) -> str:
        """The state before the first query's: keys that no query has in its window, where the cache holds any."""
        keys, held, _ = self._first(b, x, shift)
        state = self._ungrouped(b, b.op("MatMul", turned(b, keys, 5), held))
        return str(b.op("Add", state, x["state"])) if "state" in x else state

    def _first(self, b: Builder, x: dict[str, str], count: str) -> tuple[str, str, str]:
        """The first `count` keys and their values, and their places; where there are none, one that holds nothing."""
        taken = str(b.op("Max", count, b.number(1)))
        bounds = b.ints(0), b.unsqueeze(taken, 0), b.ints(2)
        keys, v, counts = (b.op("Slice", x[name], *bounds) for name in ("key_features", "v", "counts"))
        places = counted(b, taken)
        there = b.unsqueeze(b.cast(str(b.op("Less", places, count)), self.plan.wide), 1)
        held = b.op("Mul", with_ones(b, v, self.plan.wide), b.op("Mul", counts, there))
        return self._grouped(b, keys, self.own, self.features), b.unsqueeze(str(held), 2), places

    def _split(self, b: Builder, sums: str, axis: int) -> tuple[str, str]:
        """Numerator and denominator [.., V + 1] -> [.., V], [.., 1]."""
        width = self.plan.widths[1]
        return b.slice(sums, axis, 0, width), b.slice(sums, axis, width, width + 1)

    def _grouped(self, b: Builder, value: str, groups: int, width: int) -> str:
        """[B, Hkv G, S, K] -> [B, Hkv, G, S, K]."""
        return str(b.op("Reshape", value, b.ints(0, self.plan.heads[0], groups, -1, width)))

    def _ungrouped(self, b: Builder, state: str) -> str:
        """[B, Hkv, G, F, V + 1] -> [B, Hf, F, V + 1]."""
        heads, width = self.plan.heads[0] * self.own, self.plan.widths[1] + 1
        return str(b.op("Reshape", state, b.ints(0, heads, self.features, width)))

    def _join(
        self, b: Builder, x: dict[str, str], span: Span, near: Near | None, far: tuple[str, str], rank: int
    ) -> str:
        plan, (out, total) = self.plan, far
        if near is None:
            return plan.merged(b, b.op("Div", out, b.op("Max", total, plan.scalar(b, TINY))), span.queries)
        gate = b.op("Reshape", x["gate"], b.ints(0, *plan.heads, *[1] * (rank - 3)))
        mass = gate if near.mass is None else b.op("Mul", gate, near.mass)
        total = b.op("Add", mass, b.op("Mul", near.largest, total))
        total = b.op("Max", total, plan.scalar(b, TINY))
        # Two factors per row rather than a sum, a product and a quotient over all values.
        exact = b.op("Mul", near.product, b.op("Div", gate, total))
        out = b.op("Add", exact, b.op("Mul", out, b.op("Div", near.largest, total)))
        return plan.merged(b, out, span.queries)


def _triangle(plan: Plan) -> torch.Tensor:
    return torch.ones(BLOCK, BLOCK, dtype=plan.wide).tril()
