"""ONNX form of softplus attention: all visible keys for a segment of queries at a time.

Few queries, as in decoding, are one segment; many run through Scan, so that memory grows with the number of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphopt.backends.onnx.attention_parts import BLOCK, Operands, counted, operands, part, turned
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers
from graphopt.backends.onnx.window_attention import Span, few_or_many, inside
from graphopt.ops.softplus_attention import EPS, FEW, evenness


@lowers("graphopt::softplus_attention")
def _softplus_attention(call: Call) -> str:
    """LSSA or LSSAR; the number of visible keys comes from the number of keys, and from the weights where given."""
    need(call.builder.opset >= 13, "softplus attention below opset 13, whose sums take their axes otherwise")
    given = operands(call, ("q", "k", "v", "key_weight"))
    heads, keys = given.shapes["q"][1], given.shapes["k"][1]
    plan = _Plan(
        (keys, heads // keys),
        (given.shapes["k"][3], given.shapes["v"][3]),
        call.get(4, "power", 0),
        call.get(5, "causal", True),
        given.wide,
    )

    def body(b: Builder, inputs: list[str]) -> str:
        x = given.widened(b, inputs)
        span = Span.of(b, x["q"], x["k"])
        short = b.graph("few", lambda i, _: plan.few(i, x, span), dtype=plan.wide)
        long = b.graph("many", lambda i, _: plan.many(i, x, span), dtype=plan.wide)
        (out,) = few_or_many(b, span, short, long)
        return b.cast(out, given.dtype) if given.dtype != plan.wide else str(out)

    return str(call.builder.function(plan.name(given), given.values, body))


@dataclass(frozen=True)
class _Plan:
    """What is static about the attention.

    Attributes:
        heads: of the keys, and queries for each.
        widths: of q and k, and of v.
        power: of the re-weighting; 0 leaves it out.
        causal: no query sees a later key.
        wide: the type to compute in.
    """

    heads: tuple[int, int]
    widths: tuple[int, int]
    power: int
    causal: bool
    wide: torch.dtype

    def name(self, given: Operands) -> str:
        """Of the function: all that its body depends on."""
        numbers = "_".join(map(str, (*self.heads, *self.widths)))
        reach = "causal" if self.causal else "all"
        return f"SoftplusAttention_{numbers}_power{self.power}_{reach}{given.suffix}"

    def scalar(self, b: Builder, value: float) -> str:
        """A constant in the type to compute in."""
        return b.number(value, self.wide)

    def few(self, b: Builder, x: dict[str, str], span: Span) -> str:
        """One segment; the scores are divided by the lengths of the keys, which is less work than dividing keys."""
        q = _direction(b, x["q"], self)
        lengths = turned(b, b.unsqueeze(_length(b, x["k"], self), 2), 5)
        at = counted(b, span.keys, span.past)
        return self._merged(b, self._attended(b, q, (x["k"], lengths), x["v"], x.get("key_weight"), at, span.keys))

    def many(self, b: Builder, x: dict[str, str], span: Span) -> str:
        """Segments of BLOCK queries, one after the other, each with the keys up to the last one that it sees."""
        q, k = _direction(b, x["q"], self), _direction(b, x["k"], self)

        def step(i: Builder, inputs: list[str]) -> str:
            # Scan wants equal sizes: the last segment repeats the last query, and is cut at the end.
            rows = inside(i, str(i.op("Add", i.constant(torch.arange(BLOCK), "places"), inputs[0])), span.queries)
            at = str(i.op("Add", rows, span.past))
            end = span.keys
            if self.causal:
                last = i.op("Min", i.op("Add", inputs[0], i.number(BLOCK)), span.queries)
                # A segment before all keys sees nothing, but is given one.
                end = str(i.op("Max", i.op("Add", last, span.past), i.number(1)))
            names = [name for name in ("v", "key_weight") if name in x]
            keys, v, *weight = (part(i, y, 2, 0, i.unsqueeze(end, 0)) for y in (k, *(x[n] for n in names)))
            queries = str(i.op("Gather", q, rows, axis=2))
            return self._merged(i, self._attended(i, queries, (keys, None), v, weight[0] if weight else None, at, end))

        segment = b.graph("segment", step, ["start"], self.wide, {"start": torch.int64})
        starts = b.op("Range", b.number(0), span.queries, b.number(BLOCK))
        out = b.op("Scan", starts, body=segment, num_scan_inputs=1, scan_output_axes=[2])  # [B, H, N, BLOCK, V]
        flat = b.op("Reshape", out, b.ints(0, self.heads[0] * self.heads[1], -1, self.widths[1]))
        return part(b, str(flat), 2, 0, b.unsqueeze(span.queries, 0))

    def _merged(self, b: Builder, value: str) -> str:
        """[B, Hkv, G, T, V] -> [B, H, T, V]."""
        return str(b.op("Reshape", value, b.ints(0, self.heads[0] * self.heads[1], -1, self.widths[1])))

    def _attended(
        self,
        b: Builder,
        q: str,
        keys: tuple[str, str | None],
        v: str,
        weight: str | None,
        at: str,
        count: str,
    ) -> str:
        """[B, Hkv, G, C, V] of one segment.

        Args:
            b: where the nodes go.
            q: directions [B, H, C, D].
            keys: k [B, Hkv, S, D], and what to divide scores by [B, Hkv, 1, 1, S] where those are no directions.
            v: [B, Hkv, S, V].
            weight: of each key [B or 1, 1, S, 1].
            at: the key at which each query stands [C].
            count: S as a scalar.
        """
        k, lengths = keys
        q = str(b.op("Reshape", q, b.ints(0, *self.heads, -1, self.widths[0])))
        scores = b.op("MatMul", q, turned(b, b.unsqueeze(k, 2), 5))
        if lengths is not None:
            scores = b.op("Div", scores, lengths)
        visible, seen = self._visible(b, weight, at, count)
        several = b.op("Max", seen, self.scalar(b, 1))
        growth = b.op("Mul", b.op("Log", several), self.scalar(b, math.log(self.widths[0])))
        weights = self._softplus(b, str(b.op("Mul", scores, growth)))
        if visible is not None:
            weights = str(b.op("Where", visible, weights, self.scalar(b, 0)))
        if self.power:
            weights = self._sharpened(b, weights, seen, str(several))
        out = b.op("MatMul", weights, b.unsqueeze(v, 2))
        return str(b.op("Div", out, self._total(b, weights)))

    def _visible(self, b: Builder, weight: str | None, at: str, count: str) -> tuple[str | None, str]:
        """Which keys each query sees [.., C, S], None for all; and how many those are [.., C, 1]."""
        visible = None
        if self.causal:
            visible = str(b.op("Not", b.op("Greater", b.unsqueeze(counted(b, count), 0), b.unsqueeze(at, 1))))
        if weight is None:
            if not self.causal:
                return None, b.cast(count, self.wide)
            seen = b.op("Max", b.op("Add", b.unsqueeze(at, 1), b.number(1)), b.number(0))
            return visible, b.cast(str(seen), self.wide)
        shown = b.op("Not", b.op("Equal", turned(b, b.unsqueeze(weight, 2), 5), self.scalar(b, 0)))
        visible = str(shown if visible is None else b.op("And", shown, visible))
        return visible, b.sum(b.cast(visible, self.wide), -1)

    def _softplus(self, b: Builder, x: str) -> str:
        """max(x, 0) + log(1 + exp(-|x|)), exact also where the exponential is lost beside 1.

        A runtime may compute Softplus as log(1 + exp(x)), which is 0 from about -17 down. With u the rounded 1 + z,
        log(1 + z) is log(u) - ((u - 1) - z) / u.
        """
        one = self.scalar(b, 1)
        z = b.op("Exp", b.op("Neg", b.op("Abs", x)))
        u = b.op("Add", z, one)
        lost = b.op("Div", b.op("Sub", b.op("Sub", u, one), z), u)
        return str(b.op("Add", b.op("Relu", x), b.op("Sub", b.op("Log", u), lost)))

    def _sharpened(self, b: Builder, weights: str, seen: str, several: str) -> str:
        """relu(N A - O)^p up to a factor per row; a row in which nothing exceeds the mean stays as it is."""
        mean = b.op("Div", self._total(b, weights), several)
        offset = b.cast(str(b.op("Greater", seen, self.scalar(b, FEW))), self.wide)
        excess = str(b.op("Relu", b.op("Sub", b.op("Div", weights, mean), offset)))
        largest = b.largest(excess)
        even = b.op("Not", b.op("Greater", largest, self.scalar(b, evenness(self.wide))))
        share = b.op("Div", excess, b.op("Where", even, self.scalar(b, 1), largest))
        return str(b.op("Where", even, weights, self._to_power(b, str(share))))

    def _to_power(self, b: Builder, x: str) -> str:
        """By squares and products, which are several times as fast as Pow."""
        result, exponent = "", self.power
        while True:
            if exponent % 2:
                result = str(b.op("Mul", result, x)) if result else x
            exponent //= 2
            if not exponent:
                return result
            x = str(b.op("Mul", x, x))

    def _total(self, b: Builder, weights: str) -> str:
        """Sum of each row; 1 where it is 0."""
        total = b.sum(weights, -1)
        none = b.op("Equal", total, self.scalar(b, 0))
        return str(b.op("Where", none, self.scalar(b, 1), total))


def _length(b: Builder, x: str, plan: _Plan) -> str:
    """Length of each row, at least EPS [.., 1]; the axes became an input in opset 18."""
    if b.opset >= 18:
        length = b.op("ReduceL2", x, b.ints(-1), keepdims=1)
    else:
        length = b.op("ReduceL2", x, axes=[-1], keepdims=1)
    return str(b.op("Clip", length, plan.scalar(b, EPS)))


def _direction(b: Builder, x: str, plan: _Plan) -> str:
    return str(b.op("Div", x, _length(b, x, plan)))
