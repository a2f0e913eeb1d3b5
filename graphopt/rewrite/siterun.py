"""Running a site pass: find, check, build, record, fit, verify, splice; a site that misses is left as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphOptError
from graphopt.rewrite.base import Equivalence, SitePass, Tolerance, site_name
from graphopt.rewrite.context import Context, Replacement
from graphopt.rewrite.report import SiteReport
from graphopt.rewrite.splice import splice
from graphopt.verify.numbers import difference

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.sites import Site


def run(item: SitePass, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
    """Apply a site pass to a copy of `graph`.

    Raises:
        GraphOptError: `context.only` names a site that does not exist.
    """
    student = graph.copy()
    findings = item.find(student)
    reports = [SiteReport(r.node, r.kind, "refused", r.reason) for r in findings.refusals]
    sites = _chosen(findings.sites, context.only)
    accepted = []
    for site in sites:
        reason = item.check(site)
        if reason is None:
            accepted.append(site)
        else:
            reports.append(SiteReport(site.name, site.kind, "refused", reason))
    if not accepted:
        return graph, reports
    replacements = _build(item, student, accepted, context)
    _measure(replacements, "before_fit")
    item.fit(replacements, context)
    _measure(replacements, "after_fit")
    kept = []
    for replacement in replacements:
        report = _judge(item, replacement)
        reports.append(report)
        if report.status == "rewritten":
            kept.append(replacement)
    if not kept:
        return graph, reports
    for replacement in kept:
        stem = f"graphopt.{item.name}.{site_name(replacement.site)}"
        splice(student, replacement.site, replacement.module, stem, replacement.record.inputs(0))
    item.finish(graph, student, kept, context)
    for replacement in kept:
        replacement.module.requires_grad_(False)
    student.lint()
    return student, reports


def _chosen(sites: Sequence[Any], only: Sequence[str]) -> list[Any]:
    unknown = set(only) - {site.name for site in sites}
    if unknown:
        names = ", ".join(site.name for site in sites) or "none"
        raise GraphOptError(f"no site is called {sorted(unknown)[0]!r}; there are {names}")
    return [site for site in sites if not only or site.name in only]


def _build(item: SitePass, graph: Graph, sites: Sequence[Site], context: Context) -> list[Replacement]:
    from graphopt.fit.capture import record

    torch.manual_seed(context.seed)
    records = record(graph, sites, context)
    modules = [item.build(site, context) for site in sites]
    return [Replacement(s, m, r) for s, m, r in zip(sites, modules, records, strict=True)]


def _measure(replacements: Sequence[Replacement], key: str) -> None:
    """Relative RMS error of each replacement on all recorded batches."""
    for replacement in replacements:
        total = count = 0.0
        with torch.no_grad():
            for i in range(len(replacement.record)):
                found = replacement.module(*replacement.record.inputs(i))
                total += difference(replacement.record.output(i), found).rel_rms
                count += 1
        replacement.errors[key] = total / count


def _judge(item: SitePass, replacement: Replacement) -> SiteReport:
    """Hold the last recorded batch against what the pass promises."""
    index = len(replacement.record) - 1
    inputs, expected = replacement.record.inputs(index), replacement.record.output(index)
    with torch.no_grad():
        found = replacement.module(*inputs)
    errors = dict(replacement.errors)
    if isinstance(found, torch.Tensor) and found.shape == expected.shape:
        errors["rel_rms"] = difference(expected, found).rel_rms
    reason = _miss(item, expected, found, errors)
    status = "reverted" if reason else "rewritten"
    return SiteReport(replacement.site.name, replacement.site.kind, status, reason, errors)  # type: ignore[arg-type]  # a Status


def _miss(item: SitePass, expected: torch.Tensor, found: Any, errors: dict[str, float]) -> str:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return f"expected {expected.dtype}{list(expected.shape)}, the replacement gives {_shape_text(found)}"
    if bool(torch.isfinite(expected).all()) and not bool(torch.isfinite(found).all()):
        return "the replacement gives NaN or infinite values where the original does not"
    if item.equivalence is Equivalence.ARCHITECTURE:
        return ""
    tolerance: Tolerance = item.tolerance(expected.dtype)
    if not errors["rel_rms"] <= tolerance.rel_rms or math.isnan(errors["rel_rms"]):
        return f"relative RMS error {errors['rel_rms']:.3g} is above {tolerance.rel_rms:.3g} ({tolerance.why})"
    return ""


def _shape_text(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
