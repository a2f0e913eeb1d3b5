"""What there is to rewrite: one finder per kind; passes consume sites and never match raw nodes themselves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from graphopt.errors import GraphOptError
from graphopt.sites.base import (
    AttentionSite,
    AttentionValues,
    EdgeSite,
    Findings,
    LinearSite,
    Mask,
    MaskKind,
    MlpSite,
    NormSite,
    Refusal,
    Site,
    SoftmaxSite,
)
from graphopt.subgraphs import walk

if TYPE_CHECKING:
    from graphopt.graph import Graph

KINDS = ("attention", "softmax", "mlp", "linear", "norm")


def find(graph: Graph, kind: str) -> Findings:
    """All sites of `kind` in `graph`, and what looked like one with the reason why it is none.

    Raises:
        GraphOptError: there is no such kind.
    """
    if kind not in KINDS:
        raise GraphOptError(f"no site is of kind {kind!r}; there are {', '.join(KINDS)}")
    findings: Findings = importlib.import_module(f"graphopt.sites.{kind}").find(graph)
    return findings


def find_everywhere(graph: Graph, kind: str) -> Findings:
    """As `find`, in the bodies of loops and branches too."""
    from graphopt.shapes.captured import describe_captured

    describe_captured(graph)
    found = [find(level, kind) for level in walk(graph)]
    return Findings(tuple(s for f in found for s in f.sites), tuple(r for f in found for r in f.refusals))


__all__ = [
    "KINDS",
    "AttentionSite",
    "AttentionValues",
    "EdgeSite",
    "Findings",
    "LinearSite",
    "Mask",
    "MaskKind",
    "MlpSite",
    "NormSite",
    "Refusal",
    "Site",
    "SoftmaxSite",
    "find",
    "find_everywhere",
]
