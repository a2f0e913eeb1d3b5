"""Finding attention: from each softmax and each fused operator, checked by running the region it covers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention import fused, operators, spelled
from graphopt.sites.attention.reference import attend, compare, reference
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.base import AttentionSite, Findings, Refusal

if TYPE_CHECKING:
    from graphopt.graph import Graph

__all__ = ["attend", "compare", "find", "reference"]

READERS = {"softmax": spelled.read, "sdpa": fused.read, **operators.READERS}

# How far behind an anchor its product with the values may stand.
_DEPTH = 12
_NEIGHBOURS = 60


def find(graph: Graph) -> Findings:
    """All attention in `graph`, and every softmax and fused operator that is none, with the reason."""
    anchors = [n for n in graph.nodes if vocabulary.kind(n) in READERS]
    if not anchors:
        return Findings()
    try:
        view = View.of(graph, _surroundings(anchors))
    except RefusedError as refused:
        return Findings(refusals=tuple(_refusal(n, refused) for n in anchors))
    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    for anchor in anchors:
        try:
            sites.append(_read(view, anchor))
        except RefusedError as refused:
            refusals.append(_refusal(anchor, refused))
    return Findings(tuple(_distinct(sites)), tuple(refusals))


def _read(view: View, anchor: fx.Node) -> AttentionSite:
    return READERS[vocabulary.kind(anchor)](view, anchor)


def _refusal(node: fx.Node, refused: RefusedError) -> Refusal:
    return Refusal("attention", vocabulary.name_of(node), str(refused))


def _surroundings(anchors: list[fx.Node]) -> list[fx.Node]:
    """The anchors and what follows them, as far as a site and the layout of its result may reach."""
    found: dict[fx.Node, None] = {}
    for anchor in anchors:
        level, count = [anchor], 0
        for _ in range(_DEPTH):
            level = [u for n in level for u in n.users if u.op != "output" and u not in found]
            count += len(level)
            if count > _NEIGHBOURS:
                break
            found.update(dict.fromkeys(level))
        found[anchor] = None
    return list(found)


def _distinct(sites: list[AttentionSite]) -> Iterator[AttentionSite]:
    """The sites with names that are unique in the graph."""
    taken: set[str] = set()
    for site in sites:
        name = site.name if site.name not in taken else f"{site.name}.{site.anchor.name}"
        taken.add(name)
        yield site if name == site.name else replace(site, name=name)
