"""Making a site out of what was read: inputs, `split` and `merge`, mask, and the check that it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention import region
from graphopt.sites.attention.history import past_of, rotated
from graphopt.sites.attention.layout import Program
from graphopt.sites.attention.masking import MaskPart, causal_rule, combine
from graphopt.sites.attention.operands import Operand
from graphopt.sites.attention.scores import Term
from graphopt.sites.attention.unrotated import sources_of
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.base import AttentionSite, AttentionValues, Mask, MaskKind
from graphopt.sites.masks import Verdict, evaluate
from graphopt.sites.samples import Sample
from graphopt.sites.vocabulary import kind


@dataclass(frozen=True)
class Part:
    """One of q, k, v: which input it is, and how it becomes [B, H, T, D]."""

    index: int
    program: Program
    factor: float = 1.0
    dtype: torch.dtype | None = None
    """What it is cast to, where the site casts it."""

    def __call__(self, values: Sequence[Any]) -> Any:
        """The operand from the values of the site's inputs."""
        x = self.program(values[self.index])
        x = x if self.factor == 1.0 else torch.mul(x, self.factor)
        return x if self.dtype is None else x.to(self.dtype)


@dataclass(frozen=True)
class Split:
    """From the values of the site's inputs to the canonical operands."""

    q: Part
    k: Part
    v: Part
    masks: tuple[MaskPart, ...]
    causal: str = ""
    """`start` or `end` where the mask has to hold a causal rule that no input carries."""

    @property
    def how(self) -> object:
        """What the mask is made of: equal where it is made the same way."""
        return self.masks, self.causal

    @property
    def computed(self) -> frozenset[int]:
        """The inputs that hold queries, keys and values."""
        return frozenset(p.index for p in (self.q, self.k, self.v))

    def __call__(self, *values: Any) -> AttentionValues:
        """Run on tensors or fx proxies."""
        q, k, v = self.q(values), self.k(values), self.v(values)
        rules = [causal_rule(q, k, self.causal)] if self.causal else []
        return AttentionValues(q, k, v, combine(self.masks, values, rules))


@dataclass(frozen=True)
class Merge:
    """From [B, Hq, T, Dv] to the value that leaves the site."""

    program: Program
    dtype: torch.dtype | None = None

    def __call__(self, y: Any) -> Any:
        """Run on tensors or fx proxies."""
        x = self.program(y)
        return x if self.dtype is None else x.to(self.dtype)


@dataclass(frozen=True)
class Draft:
    """What a reader found; `core` are the nodes that it passed, `causal` a rule without an input."""

    anchor: fx.Node
    output: fx.Node
    q: Operand
    k: Operand
    v: Operand
    operands: tuple[fx.Node, fx.Node, fx.Node]
    """What the products themselves read: their types are those of the canonical operands."""
    terms: tuple[tuple[Term, Program], ...]
    core: tuple[fx.Node, ...]
    merge: Program
    scale: float
    softcap: float
    form: str
    causal: bool = False
    exposable: tuple[fx.Node, ...] = ()
    """The scores and weights among `core`: what is also used outside of them the site exposes."""


def assemble(view: View, draft: Draft) -> AttentionSite:
    """Build and check the site.

    Raises:
        RefusedError: a value inside that cannot be exposed is used outside, or the region computes something else.
    """
    terms, implied = _outside_terms(view, draft)
    nodes = [draft.q.node, draft.k.node, draft.v.node, *(t.value for t, _ in terms)]
    inputs = tuple(dict.fromkeys(nodes))
    parts = [
        Part(inputs.index(x.node), x.program, 1.0 if i < 2 else x.factor, _cast(view, x.node, original))
        for i, (x, original) in enumerate(zip((draft.q, draft.k, draft.v), draft.operands, strict=True))
    ]
    _repeat_alike(parts, _canonical_shapes(view, parts, inputs)[0])
    masks = tuple(MaskPart(t.form, inputs.index(t.value), p, t.factor) for t, p in terms)
    passed = [n for x in (draft.q, draft.k, draft.v) for n in x.passed]
    covered, exposed = region.cover(view, [*draft.core, *passed], inputs, draft.output, draft.exposable)
    shapes = _canonical_shapes(view, parts, inputs)
    square = all(q[2] == k[2] for q, k, _ in shapes)
    rule = draft.causal or implied
    bare = rule and not masks and (square or implied)
    rope = rotated(view, draft.q.node) and rotated(view, draft.k.node)
    split = Split(parts[0], parts[1], parts[2], masks, "" if not rule or bare else "start" if draft.causal else "end")
    site = AttentionSite(
        name=vocabulary.name_of(draft.anchor),
        anchor=draft.anchor,
        nodes=covered,
        inputs=inputs,
        split=split,
        merge=Merge(draft.merge, _cast_back(view, parts[2], inputs, draft.output)),
        scale=draft.scale * draft.q.factor * draft.k.factor,
        mask=Mask(MaskKind.CAUSAL if bare else MaskKind.NONE),
        softcap=draft.softcap,
        query_heads=_static(s[0][1] for s in shapes),
        kv_heads=_static(s[1][1] for s in shapes),
        head_dim=_static(s[0][3] for s in shapes),
        value_dim=_static(s[2][3] for s in shapes),
        dtype=parts[2].dtype or view.samples[0].dtypes[inputs[parts[2].index]],
        rope=rope,
        sources=sources_of(view, draft.q.node, draft.k.node, (draft.q.program, draft.k.program)) if rope else None,
        past=past_of(view, draft.k.node, draft.v.node),
        exposed=exposed,
        form=draft.form,
    )
    region.check(view, site)
    if bare:
        why = "the operator is causal" if draft.causal else "its mask is constant: query i sees keys up to i + (S - T)"
        return replace(site, mask=Mask(MaskKind.CAUSAL, reason=why))
    whole = inputs[masks[0].index] if len(masks) == 1 and not split.causal and masks[0].plain else None
    return replace(site, mask=decide(view, site, whole, any(m.form == "add" for m in masks)))


def _repeat_alike(parts: list[Part], shapes: tuple[tuple[int, ...], ...]) -> None:
    """Where the repeated heads of only one of k and v could be read past, repeat the other's: both have Hkv heads."""
    heads = [shapes[i][1] for i in (1, 2)]
    for i, own, other in ((1, *heads), (2, *reversed(heads))):
        if own < other:
            program = parts[i].program.then(("repeat_interleave", other // own, 1))
            parts[i] = replace(parts[i], program=program)


def decide(view: View, site: AttentionSite, value: fx.Node | None, additive: bool) -> Mask:
    """The mask of a site, its kind decided by evaluating what `split` makes of it.

    Args:
        view: the graph.
        site: as far as it is known.
        value: the input that is the whole mask, if one is.
        additive: whether the mask is added.
    """
    sample, computed = view.samples[0], computed_inputs(site)
    nodes = [n for n in site.inputs if n not in computed]
    shapes = tuple(sample.shapes[n] for n in site.inputs)
    key = (tuple(nodes), shapes, value, getattr(site.split, "how", site.split))
    if key not in view.verdicts:
        view.verdicts[key] = _decide(sample, site, nodes, value, additive)
    return view.verdicts[key]


def _decide(
    sample: Sample, site: AttentionSite, nodes: Sequence[fx.Node], value: fx.Node | None, additive: bool
) -> Mask:
    computed = [n for n in site.inputs if n not in nodes]
    blank = {n: torch.zeros(sample.shapes[n], dtype=sample.dtypes[n]) for n in computed}

    def split(values: Mapping[fx.Node, Any]) -> AttentionValues:
        return site.split(*({**blank, **values}[n] for n in site.inputs))

    shown = split(sample.values(nodes, sample.sizes_known()))
    if shown.mask is None:
        return Mask(MaskKind.NONE, reason="there is no mask")

    def compute(values: Mapping[fx.Node, Any]) -> torch.Tensor:
        mask = split(values).mask
        assert mask is not None, "a site has a mask on all samples or on none"
        return mask

    verdict: Verdict = evaluate(sample.graph, nodes, compute, sample, shown.q.shape[2], shown.k.shape[2])
    return Mask(verdict.kind, value, additive, verdict.window, verdict.reason)


def computed_inputs(site: AttentionSite) -> set[fx.Node]:
    """The inputs that hold queries, keys and values; the others are masks and weights."""
    indices: frozenset[int] = getattr(site.split, "computed", frozenset())
    return {site.inputs[i] for i in indices}


def _outside_terms(view: View, draft: Draft) -> tuple[list[tuple[Term, Program]], bool]:
    """The mask terms that are inputs of the site, and whether there is a causal one that it makes for itself.

    A mask that only depends on sizes of values inside of the site cannot be an input.
    """
    inner = set(draft.core)
    kept, implied = [], False
    for term, program in draft.terms:
        if not vocabulary.ancestors([term.value]) & inner:
            kept.append((term, program))
        elif vocabulary.depends_on_values(term.value):
            raise RefusedError(f"the mask {vocabulary.name_of(term.value)} is computed from the scores")
        else:
            _require_causal(view, draft, term, program)
            implied = True
    return kept, implied


def outermost(view: View, term: Term, inner: set[fx.Node]) -> Term:
    """The term on the value that it is made of: before a negation or an expansion to the scores' size."""
    while (given := vocabulary.source(term.value)) is not None:
        name = kind(term.value)
        if name == "not" and term.form != "add":
            term = replace(term, form="keep" if term.form == "hide" else "hide", value=given)
        elif name in ("expand", "identity", "cast") and _same(view, term.value, given, inner):
            term = replace(term, value=given)
        else:
            break
    return term


def _same(view: View, node: fx.Node, given: fx.Node, inner: set[fx.Node]) -> bool:
    """Whether a value that depends on the inside broadcasts like what it is made of."""
    types = [s.dtypes.get(n) for s in view.samples for n in (node, given)]
    return bool(vocabulary.ancestors([node]) & inner) and len(set(types)) == 1


def _require_causal(view: View, draft: Draft, term: Term, program: Program) -> None:
    part = MaskPart(term.form, 0, program, term.factor)
    for sample in view.samples:
        queries, keys = sample.shapes[draft.operands[0]], sample.shapes[draft.operands[1]]
        shape = sample.shapes[term.at]
        verdict = evaluate(
            view.graph, [term.value], lambda v: combine([part], [v[term.value]]), sample, shape[-2], shape[-1]
        )
        if verdict.kind is not MaskKind.CAUSAL:
            raise RefusedError(
                f"the mask {vocabulary.name_of(term.value)} is made from the size of the scores "
                f"{queries} {keys} and is {verdict.kind.value}, not just causal"
            )


def _canonical_shapes(
    view: View, parts: Sequence[Part], inputs: Sequence[fx.Node]
) -> list[tuple[tuple[int, ...], ...]]:
    return [
        tuple(tuple(p.program(torch.empty(s.shapes[inputs[p.index]], device="meta")).shape) for p in parts)
        for s in view.samples
    ]


def _cast(view: View, node: fx.Node, original: fx.Node) -> torch.dtype | None:
    given, wanted = (view.samples[0].dtypes.get(n) for n in (node, original))
    return wanted if given != wanted else None


def _cast_back(view: View, v: Part, inputs: Sequence[fx.Node], output: fx.Node) -> torch.dtype | None:
    given = v.dtype or view.samples[0].dtypes.get(inputs[v.index])
    wanted = view.samples[0].dtypes.get(output)
    return wanted if given != wanted else None


def _static(sizes: Any) -> int | None:
    found = set(sizes)
    return int(found.pop()) if len(found) == 1 else None
