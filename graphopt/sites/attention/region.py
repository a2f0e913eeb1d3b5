"""Which nodes a site covers, and running them alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention.reference import compare
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.base import AttentionSite
from graphopt.sites.masks import WEIGHT_LIMIT, weight_cost
from graphopt.sites.samples import Pattern, Sample, sample_inputs
from graphopt.sites.vocabulary import kind, name_of

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Closure:
    """Answers whether the value of a node serves only the one output of a site, and what the site may expose."""

    def __init__(
        self, view: View, output: fx.Node, barriers: Iterable[fx.Node] = (), exposable: Iterable[fx.Node] = ()
    ) -> None:
        """Args: view: graph. output: of the site. barriers: values that enter it. exposable: see `cover`."""
        self._view = view
        self.before = vocabulary.ancestors([output])
        known = {**dict.fromkeys(barriers, False), **dict.fromkeys(exposable, True), output: True}
        self._known: dict[fx.Node, bool] = known

    def __call__(self, node: fx.Node) -> bool:
        """Whether every path from `node` leads through the output or an exposable value."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            users = self._view.users(current)
            if current not in self.before or not users:
                self._known[current] = False
                continue
            unknown = [u for u in users if u not in self._known]
            if unknown and not any(self._known.get(u) is False for u in users):
                pending += unknown
                continue
            self._known[current] = all(self._known[u] for u in users if u in self._known)
        return self._known[node]


def cover(
    view: View,
    core: Iterable[fx.Node],
    inputs: Iterable[fx.Node],
    output: fx.Node,
    exposable: Iterable[fx.Node] = (),
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The nodes of the site, and those of `exposable` that are also used outside of it.

    They are `core`, all between it and the output, and constants and sizes only they use.

    Raises:
        RefusedError: another value inside is used outside, or an input depends on the inside.
    """
    allowed, exposed = set(exposable), []
    before, inside = vocabulary.ancestors([output]), set(core)
    ordered = sorted(before, key=view.order.__getitem__)
    for node in ordered:
        if node not in inside and any(parent in inside for parent in node.all_input_nodes):
            inside.add(node)
    for node in ordered:
        users = view.users(node) if node in inside and node is not output else []
        outside = [u for u in users if u not in inside]
        if outside and node in allowed:
            exposed.append(node)
            continue
        for user in outside:
            by = "as an output of the model" if user.op == "output" else f"by {name_of(user)} ({kind(user)})"
            raise RefusedError(f"{name_of(node)} ({kind(node)}) is used outside of the attention {by}")
    given = set(inputs)
    for node in given & inside:
        raise RefusedError(f"{name_of(node)} ({kind(node)}), which the attention reads, depends on its inside")
    for node in reversed(ordered):
        if node in inside or node in given or node.op == "placeholder":
            continue
        if all(u in inside for u in view.users(node)) and not vocabulary.depends_on_values(node):
            inside.add(node)
    unused = [n for n in view.order if n in view.dead and _reads(n, inside)]
    return (*(n for n in ordered if n in inside and n is not output), *unused, output), tuple(exposed)


def _reads(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node that nothing needs hangs on the inside alone; adds it."""
    hangs = any(parent in inside for parent in node.all_input_nodes)
    if hangs:
        inside.add(node)
    return hangs


def region_values(
    view: View, sample: int, site: AttentionSite, pattern: Pattern
) -> tuple[list[Any], torch.Tensor] | None:
    """Values of the site's inputs, random where they hold q, k or v, and its output for them."""
    shown = view.samples[sample]
    fresh = Sample(view.graph, sample_inputs(view.graph, 1, shown.sizes, pattern), shown.sizes)
    values = _inputs(shown, fresh, site)
    if values is None:
        return None
    given = {**shown.sizes_known(), **dict(zip(site.inputs, values, strict=True))}
    found = fresh.values([site.output], given).get(site.output)
    return (values, found) if isinstance(found, torch.Tensor) else None


def _inputs(shown: Sample, fresh: Sample, site: AttentionSite) -> list[Any] | None:
    """Random floats for queries, keys and values; the model's own values for masks and weights."""
    computed: frozenset[int] = getattr(site.split, "computed", frozenset())
    others = [n for i, n in enumerate(site.inputs) if i not in computed]
    generator = torch.Generator().manual_seed(2)
    values: list[Any] = []
    if weight_cost(shown.graph, others, shown.sizes_known()) <= WEIGHT_LIMIT:
        own = fresh.values(others, shown.sizes_known())
    else:  # any mask will do for the comparison; the model's own would take a part of the model to compute
        own = {n: _anything(shown.shapes[n], shown.dtypes[n], generator) for n in others if n in shown.shapes}
    own.update(_consistent(shown, site))
    for i, node in enumerate(site.inputs):
        if i not in computed:
            values.append(own.get(node))
        elif node in shown.shapes:
            values.append(torch.randn(shown.shapes[node], generator=generator).to(shown.dtypes[node]))
    complete = len(values) == len(site.inputs) and not any(v is None for v in values)
    return values if complete else None


def _anything(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.ones(shape).to(dtype)


def _consistent(shown: Sample, site: AttentionSite) -> dict[fx.Node, Any]:
    """Values that the operator demands to agree with the shapes, such as the lengths of caches."""
    demand = getattr(site.split, "consistent", None)
    if demand is None:
        return {}
    return {site.inputs[i]: v for i, v in demand([shown.shapes.get(n, ()) for n in site.inputs]).items()}


def check(view: View, site: AttentionSite, patterns: Sequence[Pattern] = ("right", "random")) -> None:
    """Run the site's nodes on random operands and compare with what the site claims to be.

    Raises:
        RefusedError: they compute something else.
    """
    ran = False
    for i in range(len(view.samples)):
        for pattern in patterns if i == 0 else patterns[:1]:
            found = region_values(view, i, site, pattern)
            if found is None:
                continue
            ran = True
            inputs, output = found
            try:
                error = compare(site, inputs, output)
            except (RuntimeError, IndexError, ValueError) as problem:
                raise RefusedError(f"its operands do not fit together: {problem}") from problem
            limit = _TOLERANCE.get(output.dtype, 2e-3)
            half = [_TOLERANCE[v.dtype] for v in inputs if isinstance(v, torch.Tensor) and v.dtype in _TOLERANCE]
            if not error <= max([limit, *half]):
                raise RefusedError(
                    f"it computes something else than attention: results differ by {error:.2g} of the largest"
                )
    if not ran:
        raise RefusedError("it could not be run on sample operands")
