"""What a mask means, decided by evaluating it on sample inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.base import MaskKind
from graphopt.sites.samples import Pattern, Sample, needed, sample_inputs, size_choices

if TYPE_CHECKING:
    from graphopt.graph import Graph

HIDDEN = -1e3
"""A score this far below the visible level has no weight: exp(-1000) is 0 even in float64."""
WEIGHT_LIMIT = 20_000_000
"""Evaluating a mask must not cost a forward pass of a large model."""
# Windows are looked for up to here.
_LONGEST = 4224
# What stands between a mask that the caller passes and the place where it is used.
_TRANSPARENT = frozenset(
    {"cast", "identity", "unsqueeze", "squeeze", "reshape", "expand", "slice", "transpose", "tile", "concat"}
    | {"add", "sub", "rsub", "mul", "div", "where", "masked_fill", "pad", "max", "min", "clip"}
)
_PATTERNS: tuple[tuple[Pattern, int], ...] = (
    ("ones", 0), ("right", 0), ("left", 0), ("random", 1), ("random", 2), ("random", 3),
    ("lengths", 1), ("lengths", 2), ("lengths", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """A mask on one sample: broadcastable to [B, H, queries, keys], added or (boolean) true where visible."""

    value: torch.Tensor
    queries: int
    keys: int


@dataclass(frozen=True)
class Verdict:
    """What a mask does, and how that was decided."""

    kind: MaskKind
    reason: str
    window: int | None = None


def classify(observations: Sequence[Observation]) -> Verdict:
    """The kind of a mask from its values on several samples."""
    count = f"on {len(observations)} samples" if len(observations) > 1 else "on one sample"
    visibles, uneven, positional = [], False, False
    for seen in observations:
        visible, spread, by_query = _visible(seen)
        visibles.append(visible)
        uneven, positional = uneven or spread, positional or by_query
    hiding = any(not bool(v.all()) for v in visibles)
    if uneven:
        return _biased(visibles, hiding, positional, count)
    if not hiding:
        return Verdict(MaskKind.NONE, f"hides nothing {count}")
    if all(_fits(v, _all_rows(v)) for v in visibles):
        return Verdict(MaskKind.PADDING, f"every query sees the same keys {count}")
    if all(_fits(v, causal(v), padded=False) for v in visibles):
        return Verdict(MaskKind.CAUSAL, f"query i sees exactly the keys up to i + (S - T) {count}")
    if all(_fits(v, causal(v)) for v in visibles):
        return Verdict(MaskKind.CAUSAL_PADDING, f"causal, and further keys are hidden from every query {count}")
    window = max(_reach(v) for v in visibles)
    if all(_fits(v, causal(v) & _within(v, window)) for v in visibles):
        return Verdict(MaskKind.SLIDING, f"each query sees the last {window} keys {count}", window)
    if all(_fits(v, _from_start(v)) for v in visibles):
        return Verdict(MaskKind.ARBITRARY, f"causal from the first key on: query i sees keys up to i {count}")
    return Verdict(MaskKind.ARBITRARY, f"neither causal, nor the same for every query, nor a window {count}")


def _biased(visibles: Sequence[torch.Tensor], hiding: bool, positional: bool, count: str) -> Verdict:
    if not positional and all(_fits(v, _all_rows(v)) for v in visibles):
        return Verdict(MaskKind.PADDING, f"finite biases that depend on the key only {count}")
    if not hiding:
        return Verdict(MaskKind.BIAS, f"finite biases that depend on query and key {count}")
    form = "causal, with" if all(_fits(v, causal(v)) for v in visibles) else "hides keys and has"
    return Verdict(MaskKind.ARBITRARY, f"{form} finite biases on the visible ones {count}")


def _visible(seen: Observation) -> tuple[torch.Tensor, bool, bool]:
    """Which keys each query sees [..., T, S]; whether the visible ones differ; whether by the query, too."""
    shape = torch.broadcast_shapes(seen.value.shape, (seen.queries, seen.keys))
    value = seen.value.expand(shape)
    if value.dtype == torch.bool:
        return value, False, False
    value = value.to(torch.float64)
    level = value.amax(-1, keepdim=True)
    # A row that hides everything keeps its own level far below zero, and sees nothing.
    visible = (value > level + HIDDEN) & (level > HIDDEN)
    high = value.masked_fill(~visible, -torch.inf).amax(-1)
    low = value.masked_fill(~visible, torch.inf).amin(-1)
    spread = (high - low)[visible.any(-1)]
    scale = 1e-6 * max(1.0, float(value[visible].abs().max()) if bool(visible.any()) else 1.0)
    uneven = bool((spread > scale).any())
    rows = value.masked_fill(~visible, 0.0)
    shifted = rows - rows.amax(-1, keepdim=True)
    seen_by_both = visible & visible[..., :1, :]
    by_query = bool(((shifted - shifted[..., :1, :]).abs() > scale)[seen_by_both].any())
    return visible, uneven, uneven and by_query


def causal(visible: torch.Tensor) -> torch.Tensor:
    """Query i sees keys up to i + (S - T)."""
    queries, keys = visible.shape[-2:]
    return _behind(queries, keys) >= 0


def _from_start(visible: torch.Tensor) -> torch.Tensor:
    """Query i sees keys up to i, however many keys there are."""
    queries, keys = visible.shape[-2:]
    return torch.arange(queries).unsqueeze(1) >= torch.arange(keys)


def _within(visible: torch.Tensor, window: int) -> torch.Tensor:
    return _behind(*visible.shape[-2:]) < window


def _behind(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(queries).unsqueeze(1) + (keys - queries) - torch.arange(keys)


def _all_rows(visible: torch.Tensor) -> torch.Tensor:
    return torch.ones(visible.shape[-2:], dtype=torch.bool)


def _reach(visible: torch.Tensor) -> int:
    """How far back the farthest visible key is, the query's own position included."""
    behind = _behind(*visible.shape[-2:]).expand(visible.shape)
    return int(behind[visible].max()) + 1 if bool(visible.any()) else 1


def _fits(visible: torch.Tensor, rule: torch.Tensor, padded: bool = True) -> bool:
    """Whether `visible` is `rule`, with some keys hidden from every query where `padded`.

    A row for which nothing is left is ignored: exporters leave it all hidden, or make it all visible.
    """
    keys = _kept_keys(visible, rule) if padded else torch.ones(visible.shape[-1], dtype=torch.bool)
    expected = (rule & keys.unsqueeze(-2)).expand(visible.shape)
    nothing = ~visible.any(-1) | (~expected.any(-1) & visible.all(-1))
    return bool(((visible == expected).all(-1) | nothing).all())


def _kept_keys(visible: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
    """The keys [..., S] that some query sees, among the rows that follow `rule` strictly."""
    obedient = (visible <= rule).all(-1, keepdim=True)
    return (visible & obedient).any(-2)


def evaluate(
    graph: Graph,
    nodes: Sequence[fx.Node],
    compute: Callable[[Mapping[fx.Node, Any]], torch.Tensor],
    observed: Sample,
    queries: int,
    keys: int,
) -> Verdict:
    """The kind of the mask that `compute` makes of the values of `nodes`.

    Args:
        graph: the model.
        nodes: the values that the mask is made of.
        compute: the mask from those values.
        observed: shapes on one choice of sizes; the samples have the same sizes.
        queries: T on that sample.
        keys: S on that sample.
    """
    known = observed.sizes_known()
    cost = weight_cost(graph, nodes, known)
    if cost > WEIGHT_LIMIT:
        return Verdict(MaskKind.ARBITRARY, f"evaluating it takes a part of the model with {cost} weights")
    variable = any(vocabulary.depends_on_values(n) for n in nodes)
    observations = []
    for pattern, seed in _PATTERNS if variable else _PATTERNS[:1]:
        sample = Sample(graph, _inputs(graph, nodes, observed, pattern, seed), observed.sizes)
        values = sample.values(nodes, known)
        if len(values) == len(set(nodes)):
            observations.append(Observation(compute(values), queries, keys))
    if not observations:
        return Verdict(MaskKind.ARBITRARY, "it could not be evaluated on sample inputs")
    if queries == 1 and set(observed.sizes.values()) == {1}:
        return Verdict(MaskKind.ARBITRARY, "it could be evaluated for a single query only")
    verdict = classify(observations)
    given = caller_given(graph, nodes)
    if given is not None and verdict.kind in (MaskKind.BIAS, MaskKind.ARBITRARY):
        return Verdict(MaskKind.ARBITRARY, f"{verdict.reason}; the caller passes it as input {given.name!r}")
    return _longer(graph, nodes, compute, observed, max(queries, keys), verdict)


def _longer(
    graph: Graph,
    nodes: Sequence[fx.Node],
    compute: Callable[[Mapping[fx.Node, Any]], torch.Tensor],
    observed: Sample,
    length: int,
    verdict: Verdict,
) -> Verdict:
    """Whether a window shows on sequences that are longer than every number in the mask's computation."""
    numbers = [n for n in _numbers(graph, nodes) if length < n <= _LONGEST]
    cheap = weight_cost(graph, nodes, {}) <= WEIGHT_LIMIT // 10
    if not numbers or not observed.sizes or verdict.kind is MaskKind.SLIDING or not cheap:
        return verdict
    for sizes in size_choices(graph, longer=max(numbers)):
        sample = Sample(graph, sample_inputs(graph, 0, sizes, "ones"), sizes)
        values = sample.values(nodes)
        if len(values) < len(set(nodes)):
            continue
        mask = compute(values)
        if mask.dim() < 2 or mask.shape[-1] <= max(numbers):
            continue
        found = classify([Observation(mask, mask.shape[-2], mask.shape[-1])])
        return found if found.kind in (MaskKind.SLIDING, MaskKind.ARBITRARY) else verdict
    return verdict


def _numbers(graph: Graph, nodes: Sequence[fx.Node]) -> set[int]:
    """Whole numbers that the computation of a mask contains: one of them may be a window."""
    found: set[int] = set()
    for node in vocabulary.value_ancestors(nodes):
        value = vocabulary.scalar(graph, node) if node.op == "get_attr" else None
        plain = [abs(a) for a in node.args if isinstance(a, int)] if node.op == "call_function" else []
        found.update(plain if value is None or value != value or abs(value) > _LONGEST else [int(abs(value))])
    return found


def _inputs(graph: Graph, nodes: Sequence[fx.Node], observed: Sample, pattern: Pattern, seed: int) -> list[Any]:
    """Sample inputs in which floating-point masks, too, hold zeros and ones."""
    values = sample_inputs(graph, seed, observed.sizes, pattern)
    given = {n for node in nodes for n in _given_floats(graph, node)}
    twins = sample_inputs(_integer_twin(graph, given), seed, observed.sizes, pattern) if given else values
    return [
        twin.to(value.dtype) if node in given else value
        for node, value, twin in zip(graph.placeholders, values, twins, strict=True)
    ]


def _integer_twin(graph: Graph, given: set[fx.Node]) -> Graph:
    from dataclasses import replace

    specs = tuple(
        replace(spec, dtype=torch.int64) if node in given else spec
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True)
    )
    return replace(graph, inputs=specs)


def _given_floats(graph: Graph, node: fx.Node) -> set[fx.Node]:
    floats = {
        placeholder
        for placeholder, spec in zip(graph.placeholders, graph.inputs, strict=True)
        if isinstance(spec.dtype, torch.dtype) and spec.dtype.is_floating_point
    }
    return floats & _reached_plainly(node)


def _reached_plainly(node: fx.Node) -> set[fx.Node]:
    return vocabulary.ancestors([node], stop=lambda n: vocabulary.kind(n) not in _TRANSPARENT)


def caller_given(graph: Graph, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The float or boolean input that a mask is, up to layout, casts and arithmetic.

    Integer inputs count as tokens or lengths, of which the model makes the mask.
    """
    types = {n: spec.dtype for n, spec in zip(graph.placeholders, graph.inputs, strict=True)}
    for node in nodes:
        for reached in _reached_plainly(node):
            kind = types.get(reached)
            if isinstance(kind, torch.dtype) and (kind.is_floating_point or kind == torch.bool):
                return reached
    return None


def weight_cost(graph: Graph, nodes: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> int:
    """How many weights take part in the computation of `nodes` from the inputs and the values of `known`."""
    weights = [graph.weight(n) for n in needed(graph, nodes, known) if n.op == "get_attr"]
    return sum(int(w.numel()) for w in weights if isinstance(w, torch.Tensor) and w.is_floating_point())
