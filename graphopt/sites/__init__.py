"""What there is to rewrite: one finder per kind; passes consume sites and never match raw nodes themselves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from graphopt.errors import GraphOptError
from graphopt.sites.base import (
    AttentionSite,
    AttentionValues,
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


__all__ = [
    "KINDS",
    "AttentionSite",
    "AttentionValues",
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
]
