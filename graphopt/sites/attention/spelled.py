"""Attention spelled out as matmul, softmax, matmul."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention.assemble import Draft, assemble, outermost
from graphopt.sites.attention.layout import Batch, Program, Shape, batches
from graphopt.sites.attention.operands import Canonical, head_counts, operand
from graphopt.sites.attention.product import Product
from graphopt.sites.attention.region import Closure
from graphopt.sites.attention.scores import Scores, Term, read_scores
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.attention.weights import Context, read_weights
from graphopt.sites.base import AttentionSite
from graphopt.sites.vocabulary import name_of, source

_SWAP = ("transpose", -2, -1)


def read(view: View, softmax: fx.Node) -> AttentionSite:
    """The site around a softmax.

    Raises:
        RefusedError: there is none.
    """
    given = source(softmax)
    if given is None:
        raise RefusedError("the softmax has no operand")
    _require_no_sink(view, given)
    contexts = read_weights(view, softmax)
    rank = view.rank(given)
    axis = vocabulary.softmax_axis(softmax, rank)
    if axis is None:
        raise RefusedError("the softmax flattens several axes (opset below 13 and not its last axis)")
    scores = read_scores(view, given, axis)
    reasons: list[RefusedError] = []
    for context in contexts:
        try:
            reading = _Reading(view, softmax, axis - rank, scores, context)
        except RefusedError as refused:
            reasons.append(refused)
            continue
        for inner, outer in reading.batches():
            try:
                return reading.site(inner, outer)
            except RefusedError as refused:
                reasons.append(refused)
    raise reasons[0] if reasons else RefusedError(f"products of rank {rank} are not read")


def _require_no_sink(view: View, node: fx.Node) -> None:
    """Say so where the softmax has a term besides the keys: what follows cuts it off again."""
    while vocabulary.kind(node) in (*vocabulary.SAME_VALUE, "sub"):
        given = source(node)
        if given is None:
            return
        node = given
    parts = vocabulary.operands(node) if vocabulary.kind(node) == "concat" else ()
    if any(part is not None and _are_scores(view, part) for part in parts):
        raise RefusedError(f"the scores share the softmax with an attention sink in {name_of(node)}")


def _are_scores(view: View, node: fx.Node) -> bool:
    try:
        read_scores(view, node, -1)
    except RefusedError:
        return False
    return True


class _Reading:
    def __init__(self, view: View, softmax: fx.Node, axis: int, scores: Scores, context: Context) -> None:
        self.view, self.softmax, self.scores, self.context = view, softmax, scores, context
        first, second = scores.product, context.product
        self.turned = self._keys_come_first(first, axis)
        self.q, self.k = (first.right, first.left) if self.turned else (first.left, first.right)
        self.v = second.right if context.side == "left" else second.left
        if not vocabulary.depends_on_values(self.k):
            raise RefusedError(f"the product {name_of(first.node)} has a constant operand: a linear layer")
        if not vocabulary.depends_on_values(self.v):
            raise RefusedError(f"the weights are multiplied by a constant in {name_of(second.node)}")
        inner = {*scores.nodes, *context.nodes}
        self.terms = tuple(outermost(view, t, inner) for t in scores.terms)
        free = [t.value for t in self.terms if not vocabulary.ancestors([t.value]) & inner]
        # A tuple, such as that of a dropout and its mask, holds more than weights.
        self.exposable = tuple(n for n in (*scores.nodes, *context.nodes[:-1]) if n in view.samples[0].shapes)
        self.closed = Closure(view, second.node, free, self.exposable)

    def _keys_come_first(self, product: Product, axis: int) -> bool:
        """Whether the softmax runs over the rows of the product; queries are then the columns."""
        rank = self.view.rank(product.node)
        order = list(product.out.steps[0][1]) if product.out.steps else list(range(rank))
        place = order.index(axis % rank) if -rank <= axis < 0 else -1
        if place == rank - 1:
            return False
        if place == rank - 2:
            return True
        raise RefusedError(f"the softmax runs over axis {axis}, which is neither queries nor keys")

    def batches(self) -> Iterator[tuple[Batch, Batch]]:
        """Ways to read the axes of the two products as [B, H]; they share the number of heads."""
        view, first, second = self.view, self.scores.product, self.context.product
        inner, outer = self._canonical_shapes(first), self._canonical_shapes(second)
        heads = list(self._heads(inner, outer))
        k_shape = view.shapes(self.k)[0]
        grouped = len(k_shape) == 5 and (k_shape[2] == 1 or vocabulary.kind(self.k) == "expand")
        for a in batches(inner, heads, grouped):
            for b in batches(outer, heads, grouped):
                if a.rank != b.rank or a == b:
                    yield a, b

    def _canonical_shapes(self, product: Product) -> list[Shape]:
        return [tuple(product.out(torch.empty(s, device="meta")).shape) for s in self.view.shapes(product.node)]

    def _heads(self, inner: Sequence[Shape], outer: Sequence[Shape]) -> Iterator[int]:
        for shapes in (inner, outer):
            if len(shapes[0]) == 4:
                yield shapes[0][1]
        for node in self.scores.nodes:
            shape = self.view.shapes(node)[0]
            if len(shape) == 4:
                yield shape[1]
        width, value_width = self._width(inner), self._value_width(outer)
        nodes = (self.q, self.k, self.v, self.context.product.node)
        yield from head_counts(self.view, nodes, (width, width, value_width, value_width))

    def _width(self, inner: Sequence[Shape]) -> int:
        product = self.scores.product
        left = product.left_program(torch.empty(self.view.shapes(product.left)[0], device="meta"))
        return int(left.shape[-1])

    def _value_width(self, outer: Sequence[Shape]) -> int:
        return outer[0][-1] if self.context.side == "left" else outer[0][-2]

    def site(self, inner: Batch, outer: Batch) -> AttentionSite:
        """The site with the axes read like that.

        Raises:
            RefusedError: it does not fit, or computes something else.
        """
        view, first, second = self.view, self.scores.product, self.context.product
        q_program, k_program = first.left_program, first.right_program
        if self.turned:
            q_program, k_program = k_program, q_program
        v_program = second.right_program if self.context.side == "left" else second.left_program
        q = operand(view, self.q, self._canonical(first, q_program, inner, False), self.closed)
        k = operand(view, self.k, self._canonical(first, k_program, inner, False), self.closed)
        v = operand(view, self.v, self._canonical(second, v_program, outer, True), self.closed)
        merge = outer.backward
        if self.context.side == "right":
            merge = merge.then(_SWAP)
        merge = merge.then(*second.back.steps)
        draft = Draft(
            anchor=self.softmax,
            output=second.node,
            q=q,
            k=k,
            v=v,
            operands=(self.q, self.k, self.v),
            terms=tuple((t, self._mask_program(t, inner)) for t in self.terms),
            core=(*self.scores.nodes, *self.context.nodes),
            merge=merge,
            scale=self.scores.scale,
            softcap=self.scores.softcap,
            exposable=self.exposable,
            form="matmul-softmax-matmul",
        )
        return assemble(view, draft)

    def _canonical(self, product: Product, program: Program, batch: Batch, swapped: bool) -> Canonical:
        """[..., rows, D] in the layout of a product, broadcast to its batch axes, as [B, H, rows, D]."""
        leading = [tuple(s[:-2]) for s in self._canonical_shapes(product)]

        def bring(sample: int, x: torch.Tensor) -> torch.Tensor:
            y = program(x)
            y = y.transpose(-1, -2) if swapped else y
            result: torch.Tensor = batch.forward(y.expand(*leading[sample], *y.shape[-2:]))
            return result

        return bring

    def _mask_program(self, term: Term, inner: Batch) -> Program:
        """How a mask that is put on scores of any rank broadcasts to [B, H, T, S]."""
        at, own = self.view.shapes(term.at), self.view.shapes(term.value)
        program, rank = Program(), len(own[0])
        if len(at[0]) == 3 and rank == 3 and any(s[0] != 1 for s in own):
            program = inner.forward if inner.rank == 3 else Program((("unsqueeze", 0),))
        if len(at[0]) == 5 and rank >= 4:
            program = _mask_of_rank_5(own, inner)
        return program.then(_SWAP) if self.turned and rank >= 2 else program


def _mask_of_rank_5(own: Sequence[Shape], inner: Batch) -> Program:
    ones = [all(s[-5 + i] == 1 for s in own) if len(own[0]) == 5 else True for i in range(3)]
    if len(own[0]) == 4:
        ones = [True, *(all(s[i] == 1 for s in own) for i in (0, 1))]
        if ones[1] and ones[2]:
            return Program()
        raise RefusedError("a mask of rank 4 on scores of rank 5 differs between groups of heads")
    if ones[2]:
        return Program((("squeeze", 2),))
    return Program((("squeeze", 1),)) if ones[1] else inner.forward
