"""ONNX form of LoLCATs' hybrid: softmax over a window and linear attention before it, under one denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.backends.onnx.attention_parts import BLOCK, blocks_of, counted, operands, running_sum, turned, with_ones
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers
from graphopt.backends.onnx.window_attention import (
    Near,
    Plan,
    Span,
    block_starts,
    block_weights,
    few_or_many,
    inside,
    places,
    plan_of,
    rows_near,
)
from graphopt.ops.window_attention import TINY

_CLOSED = 1e-12
"""The least gate that is computed with: it has no weight beside the linear part in fp32, and its inverse is finite."""

_SEGMENT = 4
"""Blocks that are computed together."""

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
        long = b.graph("many", lambda i, _: hybrid.segments(i, x, span), dtype=plan.wide)
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
        return [self._join(b, x, span, near, self._split(b, far, 4)), self._ungrouped(b, state)]

    def segments(self, b: Builder, x: dict[str, str], span: Span) -> list[str]:
        """Many queries: a few blocks at a time, which the processor's cache holds, and the state from one to the next.

        Memory beyond the operands and the output does not grow with the number of queries.
        """
        plan = self.plan
        shift = str(b.op("Sub", span.past, b.number(plan.window)))
        blocks = b.op("Div", b.op("Add", span.queries, b.number(BLOCK - 1)), b.number(BLOCK))
        length = b.op("Mul", b.op("Min", blocks, b.number(_SEGMENT)), b.number(BLOCK))
        within = block_starts(b, str(length))

        def step(i: Builder, inputs: list[str]) -> list[str]:
            state, start = inputs
            return self.blocks(i, x, span, (str(i.op("Add", within, start)), shift), state)

        body = b.graph("segment", step, ["state", "start"], plan.wide, {"start": torch.int64})
        starts = b.op("Range", b.number(0), span.queries, length)
        early = self._early(b, x, shift)
        state, out = b.op("Scan", early, starts, outputs=2, body=body, num_scan_inputs=1, scan_output_axes=[2])
        return [plan.merged(b, str(out), span.queries), str(state)]

    def blocks(self, b: Builder, x: dict[str, str], span: Span, at: tuple[str, str], state: str) -> list[str]:
        """Blocks of queries: the block that stands `window` before each within a product, all earlier ones as a state.

        Of that block a query sees some keys exactly and all others linearly, so both kinds of weights fit into one
        matrix. Both are on the scale of the softmax divided by the gate: y = (p v + r far) / (p_1 + r far_1) with
        r = p_max / gate.

        Args:
            b: where the nodes go.
            x: the operands.
            span: their sizes.
            at: the first query of each block [N, 1], and how far from it the block `window` before it begins.
            state: of the keys before those [B, Hf, F, V + 1].

        Returns:
            The next state, and the output [B, H, N C, V].
        """
        plan, heads, (start, shift) = self.plan, self.plan.heads, at
        rows = inside(b, places(b, start, 0, BLOCK), span.queries)
        queries = blocks_of(b, x["query_features"], rows, heads)
        near, taken = block_weights(b, x, span, plan, start) if plan.window or plan.sinks else (None, "")
        if near is not None:
            gate = b.op("Reshape", x["gate"], b.ints(0, *heads, 1, 1, 1))
            gate = b.op("Max", gate, plan.scalar(b, _CLOSED))
            queries = str(b.op("Mul", queries, b.op("Div", near.largest, gate)))
        behind, keys = self._behind(b, x, span, str(b.op("Add", start, shift)))
        v = blocks_of(b, x["v"], behind, (heads[0], 1))
        weights = b.op("Mul", b.op("MatMul", queries, turned(b, keys, 6)), b.constant(_triangle(plan), "causal"))
        total = b.sum(str(weights), -1)
        if near is not None:
            rest = near.values
            if plan.window:
                sizes = b.ints(BLOCK, plan.window + plan.sinks)
                before, rest = b.op("Split", near.values, sizes, axis=-1, outputs=2)
                weights = b.op("Add", before, weights)
            total = b.op("Add", total, plan.scalar(b, 1) if near.mass is None else near.mass)
        early = self._split(b, state, 3)
        added = b.op("MatMul", turned(b, keys, 6), v), turned(b, b.sum(keys, 4), 6)
        values, ones = (self._running(b, str(one), first) for one, first in zip(added, early, strict=True))
        out = b.op("Add", b.op("MatMul", weights, v), b.op("MatMul", queries, values[0]))
        if near is not None:
            seen = b.slice(taken, 1, BLOCK, BLOCK + plan.window + plan.sinks) if plan.window else taken
            out = b.op("Add", out, b.op("MatMul", rest, blocks_of(b, x["v"], seen, (heads[0], 1))))
        total = b.op("Add", total, b.op("MatMul", queries, ones[0]))
        out = b.op("Div", out, b.op("Max", total, plan.scalar(b, TINY)))
        joined = b.op("Reshape", out, b.ints(0, heads[0] * heads[1], -1, plan.widths[1]))
        return [self._ungrouped(b, str(b.op("Concat", values[1], ones[1], axis=-1))), str(joined)]

    def _behind(self, b: Builder, x: dict[str, str], span: Span, start: str) -> tuple[str, str]:
        """Blocks of keys from `start` [N, 1] on: their places [N, C], and features times what each key counts.

        A key that does not exist, or that no query has behind its window, counts nothing.
        """
        at = places(b, start, 0, BLOCK)
        end = b.op("Sub", span.keys, b.number(self.plan.window))
        there = b.op("And", b.op("Not", b.op("Less", at, b.number(0))), b.op("Less", at, end))
        taken = inside(b, at, span.keys)
        counts = b.unsqueeze(b.cast(str(there), self.plan.wide), 2)  # [N, C, 1]
        if self.plan.sinks or "key_weight" in x:
            counts = b.op("Mul", b.op("Gather", x["counts"], taken, axis=2), counts)
            counts = b.unsqueeze(str(counts), 1)
        return taken, str(b.op("Mul", blocks_of(b, x["key_features"], taken, (self.plan.heads[0], self.own)), counts))

    def _running(self, b: Builder, added: str, early: str) -> tuple[str, str]:
        """See `running_sum`; `early` [B, Hkv G, F, V]."""
        first = b.op("Reshape", early, b.ints(0, self.plan.heads[0], self.own, 1, self.features, -1))
        return running_sum(b, added, str(first))

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

    def _join(self, b: Builder, x: dict[str, str], span: Span, near: Near | None, far: tuple[str, str]) -> str:
        plan, (out, total) = self.plan, far
        if near is None:
            return plan.merged(b, b.op("Div", out, b.op("Max", total, plan.scalar(b, TINY))), span.queries)
        gate = b.op("Reshape", x["gate"], b.ints(0, *plan.heads, 1, 1))
        mass = gate if near.mass is None else b.op("Mul", gate, near.mass)
        total = b.op("Add", mass, b.op("Mul", near.largest, total))
        total = b.op("Max", total, plan.scalar(b, TINY))
        # Two factors per row rather than a sum, a product and a quotient over all values.
        exact = b.op("Mul", near.product, b.op("Div", gate, total))
        out = b.op("Add", exact, b.op("Mul", out, b.op("Div", near.largest, total)))
        return plan.merged(b, out, span.queries)


def _triangle(plan: Plan) -> torch.Tensor:
    return torch.ones(BLOCK, BLOCK, dtype=plan.wide).tril()
