"""The `stablemax` pass: class probabilities without exponentials, in the order of the softmax's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from graphopt.passes.attention.softmax_pass import SoftmaxReplacement, result_type
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass
from graphopt.sites import SoftmaxSite

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.report import Status

_REASONS = {
    "attention": "it weighs values in an attention, whose scores would not fall off fast enough",
    "vocabulary": "it goes over a vocabulary, whose long tail would hold most of the probability",
    "other": "its values are used inside of the model, which reads more from them than their order",
}


@dataclass(frozen=True)
class StableMax(SitePass):
    """softmax(x)   ->   s(x) / sum s(x),   s(x) = x + 1 for x >= 0, 1 / (1 - x) below

    For the classes at the end of a model alone: the largest one stays the largest one, and probabilities change.

    Prieto et al., "Grokking at the Edge of Numerical Stability" (2025).
    """

    name: ClassVar[str] = "stablemax"
    kind: ClassVar[str] = "softmax"
    equivalence: ClassVar[Equivalence] = Equivalence.ARCHITECTURE

    def check(self, site: SoftmaxSite) -> str | None:
        """Classifiers only."""
        if site.role in _REASONS:
            return f"its role is {site.role}: {_REASONS[site.role]}; stablemax is for the classes of a classifier"
        return None

    def build(self, site: SoftmaxSite, context: Context) -> SoftmaxReplacement:
        """The operator along the site's axis."""
        return SoftmaxReplacement("stablemax", site.axis, result_type(site))

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Look for rows of the calibration data whose largest class changed."""
        assert isinstance(replacement.site, SoftmaxSite)
        axis, changed, rows = replacement.site.axis, 0, 0
        with torch.no_grad():
            for i in range(len(replacement.record)):
                (x,) = replacement.record.inputs(i)
                found = replacement.module(x)
                if not x.numel():
                    continue
                at = x.argmax(axis, keepdim=True)
                # What rounding makes equal is no change, nor is NaN, which has no order.
                changed += int((found.gather(axis, at) < found.amax(axis, keepdim=True)).sum())
                rows += at.numel()
        replacement.errors["arg_max_changed"] = float(changed)
        if changed:
            return "reverted", f"expected the largest class to stay, but it changed in {changed} of {rows} rows"
        return "rewritten", f"the largest class is the same in all {rows} rows of the calibration data"
