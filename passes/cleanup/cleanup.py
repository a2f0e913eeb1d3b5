"""Removing what a model computes without need, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphopt.rewrite.base import Equivalence, Pass
from graphopt.rewrite.report import SiteReport

from . import rules
from .checking import Failure, check
from .operators import all_known, mutates
from .sweep import Rewritten, Settings, rewrite
from .workspace import Key

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.context import Context

# Each attempt leaves out what the one before got wrong; then whole rules are left out.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Cleanup(Pass):
    """f(x)   ->   f(x) with fewer nodes

    Applies the identities of `graphopt.passes.cleanup.rules` until none fits, folds constants, merges equal
    nodes and equal weights, and drops what no output needs. Every replaced value is compared with the
    original's on calibration data; a rewrite that changes one bit is taken back and reported.
    """

    name: ClassVar[str] = "cleanup"
    equivalence: ClassVar[Equivalence] = Equivalence.EXACT
    is_proven: ClassVar[bool] = True

    fold_limit: int = 1 << 20
    """Largest constant in bytes that folding stores where its operands were smaller."""
    fold_inexact: bool = False
    """Fold operators too whose last bit depends on the runtime (exp, sqrt, matrix products)."""
    rules: tuple[str, ...] = ()
    """Names of the rules to apply; empty means all."""
    skip: tuple[str, ...] = ()
    """Names of rules not to apply."""

    def __post_init__(self) -> None:
        known = rules.names()
        for name in (*self.rules, *self.skip):
            if name not in known:
                raise ValueError(f"no rule is called {name!r}; there are {', '.join(known)}")
        if self.fold_limit < 0:
            raise ValueError(f"expected fold_limit of 0 or more bytes, got {self.fold_limit}")

    def run(self, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
        """See `Pass.run`."""
        writer = next((node for node in graph.nodes if mutates(node)), None)
        if writer is not None:
            reason = f"{writer.target} writes into its operand, so equal nodes need not have equal values"
            return graph, [SiteReport(writer.name, "mutation", "refused", reason)]
        chosen = tuple(n for n in self.rules or rules.names() if n not in self.skip)
        settings = Settings(chosen, self.fold_limit, self.fold_inexact, tuple(context.only))
        result, failures = self._verified(graph, context, settings)
        reports = [*map(_reverted, failures), *_reports(result)]
        if not any(report.status == "rewritten" for report in reports):
            return graph, reports
        return result.workspace.finish(), reports

    def _verified(self, graph: Graph, context: Context, settings: Settings) -> tuple[Rewritten, list[Failure]]:
        """Rewrite, compare, and start again without what differed, until nothing differs."""
        excluded: set[Key] = set()
        failures: list[Failure] = []
        while True:
            result = rewrite(graph, settings, excluded)
            found = check(graph, result.workspace, context.calibration)
            if not found.failures:
                break
            failures += found.failures
            excluded |= {failure.application.key for failure in found.failures}
            if len(failures) >= _ATTEMPTS:
                wrong = {failure.application.rule for failure in failures}
                settings = replace(settings, chosen=[n for n in settings.chosen if n not in wrong])
        if found.random:
            what = "random operators" if all_known(graph) else "operators that are random, or that nobody knows,"
            context.notes.append(f"{found.random} rewrites could not be compared: {what} feed them")
        if found.unrun:
            context.notes.append(f"{found.unrun} rewrites could not be compared: nothing here can run what feeds them")
        return result, failures


def _reverted(failure: Failure) -> SiteReport:
    application = failure.application
    return SiteReport(application.name, application.rule, "reverted", failure.reason, failure.errors)


def _reports(result: Rewritten) -> list[SiteReport]:
    w = result.workspace
    reports = [SiteReport(a.name, a.rule, "rewritten", a.reason) for a in w.applications]
    if result.dead:
        reason = f"{result.dead} nodes and weights without use"
        reports.append(SiteReport("graph", "dead-node", "rewritten", reason))
    present = set(w.graph.nodes)
    for node, reason in result.refusals.items():
        if node in present:
            reports.append(SiteReport(w.name(node), "fold", "refused", reason))
    return reports
