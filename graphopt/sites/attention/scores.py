"""From a softmax back to the product of queries and keys: scales, masks, and a soft cap on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention.product import Product, product
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.masks import HIDDEN
from graphopt.sites.vocabulary import argument, kind, name_of, operands, source

_LAYOUT = frozenset({"reshape", "transpose", "unsqueeze", "squeeze"})


@dataclass(frozen=True)
class Term:
    """Something that is done to the scores at `at`, where they have the axes of that node.

    `add`: `value * factor` is added; `keep` / `hide`: a boolean that is true for visible / hidden keys.
    """

    form: Literal["add", "keep", "hide"]
    value: fx.Node
    at: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Scores:
    """softcap(scale * product) with the mask terms; `nodes` are those between the product and the softmax."""

    product: Product
    scale: float
    softcap: float
    terms: tuple[Term, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _State:
    """What was passed on the way back: factor that still multiplies the scores, terms, and cap."""

    factor: float = 1.0
    terms: tuple[Term, ...] = ()
    softcap: float = 0.0
    nodes: tuple[fx.Node, ...] = field(default=())

    def past(self, node: fx.Node) -> _State:
        return replace(self, nodes=(*self.nodes, node))

    def scaled(self, factor: float) -> _State:
        return replace(self, factor=self.factor * factor)

    def masked(self, term: Term) -> _State:
        return replace(self, terms=(*self.terms, term))


def read_scores(view: View, node: fx.Node, axis: int) -> Scores:
    """Read the operand of a softmax along `axis`.

    Raises:
        RefusedError: it is no product of queries and keys.
    """
    return _read(view, node, axis, _State())


def _read(view: View, node: fx.Node, axis: int, state: _State) -> Scores:
    found = product(view, node)
    if found is not None:
        return _finish(view, found, axis, state.past(node))
    name = kind(node)
    if name in ("mul", "div", "neg"):
        return _scale(view, node, name, axis, state)
    if name in ("add", "sub"):
        return _add(view, node, name, axis, state)
    if name in ("where", "masked_fill"):
        return _select(view, node, name, axis, state)
    if name == "tanh":
        return _cap(view, node, axis, state)
    if name in ("max", "clip", "maximum"):
        return _floor(view, node, axis, state)
    given = source(node)
    plain = name in vocabulary.SAME_VALUE and not (name == "cast" and vocabulary.narrows(node))
    if given is not None and (plain or name in _LAYOUT or (name == "getitem" and kind(given) == "dropout")):
        return _read(view, given, axis, state.past(node))
    raise RefusedError(_why_not(node, name))


def _why_not(node: fx.Node, name: str) -> str:
    if name == "concat":
        return f"scores are joined with something else by {name_of(node)}, such as an attention sink"
    if name in ("dequantize_linear", "quantize_linear"):
        return f"scores are quantised by {name_of(node)}"
    if name in ("placeholder", "constant"):
        return f"softmax of {'an input' if name == 'placeholder' else 'a constant'}, not of a product"
    return f"the scores come from {name_of(node)} ({name}), which is no product of queries and keys"


def _finish(view: View, found: Product, axis: int, state: _State) -> Scores:
    factor = state.factor * found.alpha
    terms = state.terms
    if found.added is not None:
        terms = (*terms, Term("add", found.added, found.node, state.factor * found.beta))
    scale = factor * state.softcap if state.softcap else factor
    return Scores(found, scale, state.softcap, terms, state.nodes)


def _scale(view: View, node: fx.Node, name: str, axis: int, state: _State) -> Scores:
    """A factor on the scores; a 0/1 mask that multiplies them is left to the check of the whole region."""
    first = source(node)
    if name == "neg" and first is not None:
        return _read(view, first, axis, state.past(node).scaled(-1.0))
    a, b = argument(node, 0, "self"), argument(node, 1, "other")
    for scores, other in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        number = view.number(other)
        if number is not None and isinstance(scores, fx.Node):
            factor = 1 / number if name == "div" else number
            return _read(view, scores, axis, state.past(node).scaled(factor))
    if name == "mul" and state.terms and isinstance(a, fx.Node) and isinstance(b, fx.Node):
        for scores, other in ((a, b), (b, a)):
            if _is_mask(view, other):
                return _read(view, scores, axis, state.past(node))
    raise RefusedError(f"the scores are scaled by {name_of(node)} with a value that is not one number")


def _is_mask(view: View, node: fx.Node) -> bool:
    values = view.samples[0].values([node], view.samples[0].sizes_known()).get(node)
    return values is not None and bool(((values == 0) | (values == 1)).all())


def _add(view: View, node: fx.Node, name: str, axis: int, state: _State) -> Scores:
    if node.kwargs.get("alpha", 1) != 1:
        raise RefusedError(f"{name_of(node)} adds a multiple of its second operand")
    terms = [n for n in operands(node) if n is not None]
    if len(terms) < 2:
        number = next((v for a in node.args if (v := view.number(a)) is not None), None)
        if len(terms) == 1 and number is not None and name == "add":
            return _read(view, terms[0], axis, state.past(node))  # softmax ignores what all scores share
        raise RefusedError(_why_not(node, name))
    reasons = []
    for i, scores in enumerate(terms if name == "add" else terms[:1]):
        sign = -1.0 if name == "sub" else 1.0
        others = [t for j, t in enumerate(terms) if j != i]
        if not vocabulary.depends_on_values(scores):
            continue
        next_state = state.past(node)
        for other in others:
            next_state = next_state.masked(Term("add", other, node, sign * state.factor))
        try:
            return _read(view, scores, axis, next_state)
        except RefusedError as refused:
            reasons.append(refused)
    # The reason of the operand that got farthest: an operand that is a mask says nothing of interest.
    raise reasons[0] if reasons else RefusedError(_why_not(node, name))


def _select(view: View, node: fx.Node, name: str, axis: int, state: _State) -> Scores:
    if name == "masked_fill":
        scores, condition, fill = (argument(node, i, n) for i, n in enumerate(("self", "mask", "value")))
        choices = [(scores, fill, "hide")]
    else:
        condition, yes, no = (argument(node, i, n) for i, n in enumerate(("condition", "self", "other")))
        choices = [(yes, no, "keep"), (no, yes, "hide")]
    for scores, fill, form in choices:
        if isinstance(scores, fx.Node) and view.far_below(fill, HIDDEN / max(1.0, abs(state.factor))):
            term = Term("keep" if form == "keep" else "hide", condition, node)
            return _read(view, scores, axis, state.past(node).masked(term))
    raise RefusedError(f"{name_of(node)} replaces scores by a value that does not hide them")


def _cap(view: View, node: fx.Node, axis: int, state: _State) -> Scores:
    """Read c * tanh(x / c): the factor so far is the cap, and what follows is inside of it."""
    given = source(node)
    if state.softcap or state.factor <= 0 or given is None:
        raise RefusedError(f"{name_of(node)} is no soft cap of the scores")
    inner = _read(view, given, axis, _State(softcap=state.factor, nodes=(*state.nodes, node)))
    if inner.terms:
        raise RefusedError(f"a mask is added inside of the soft cap {name_of(node)}")
    return replace(inner, terms=state.terms)


def _floor(view: View, node: fx.Node, axis: int, state: _State) -> Scores:
    """max(scores, very low): keeps overflowing masks finite."""
    for scores, bound in ((0, 1), (1, 0)):
        given = argument(node, scores, "self")
        low = argument(node, bound, "other")
        upper = kind(node) == "clip" and argument(node, 2, "max") is not None
        if isinstance(given, fx.Node) and view.far_below(low, HIDDEN) and not upper:
            return _read(view, given, axis, state.past(node))
    raise RefusedError(f"{name_of(node)} limits the scores")
