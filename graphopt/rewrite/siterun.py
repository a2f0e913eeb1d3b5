"""Running a site pass: find, check, build, record, fit, verify, splice; a site that misses is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from graphopt.rewrite.base import Equivalence, SitePass, Tolerance, site_name
from graphopt.rewrite.context import Context, Replacement
from graphopt.rewrite.report import SiteReport, Status
from graphopt.rewrite.splice import splice
from graphopt.sites import EdgeSite
from graphopt.verification.numbers import difference

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.sites import Site


def run(item: SitePass, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
    """Apply a site pass to a copy of `graph`."""
    student = graph.copy()
    findings = item.find(student)
    reports = [SiteReport(r.node, r.kind, "refused", r.reason) for r in findings.refusals]
    sites = [site for site in findings.sites if not context.only or _is_among(site, context.only)]
    accepted = []
    for site in sites:
        reason = item.check(site)
        if reason is None:
            accepted.append(site)
        else:
            reports.append(SiteReport(site.name, site.kind, "refused", reason))
    if not accepted:
        return graph, reports
    if item.needs_calibration and not context.spares_batches:
        context.notes.append(
            f"errors are on the {len(context.calibration)} batches that it was fitted on; "
            "from 10 batches on, one in ten is kept to judge by"
        )
    replacements = _build(item, student, accepted, context)
    _measure(item, replacements, context, "before_fit")
    item.fit(replacements, context)
    _measure(item, replacements, context, "after_fit")
    kept = []
    for replacement in replacements:
        report = _judge(item, graph, replacement, context)
        reports.append(report)
        if report.status == "rewritten":
            kept.append(replacement)
    if not kept:
        return graph, reports
    # From the last to the first: a site may read what an earlier one writes, and reads it as it was found.
    for replacement in reversed(kept):
        stem = f"graphopt.{item.name}.{site_name(replacement.site)}"
        splice(student, replacement.site, replacement.module, stem, replacement.record.inputs(0))
    before = [p.detach().clone() for r in kept for p in r.module.parameters()]
    student = item.finish(graph, student, kept, context)
    if any(
        not torch.equal(a, b) for a, b in zip(before, (p for r in kept for p in r.module.parameters()), strict=True)
    ):
        _measure_again(item, kept, reports, context)
    for replacement in kept:
        replacement.module.requires_grad_(False)
    student.lint()
    return student, reports


def _is_among(site: Site, names: Sequence[str]) -> bool:
    return site.name in names or (isinstance(site, EdgeSite) and site.of in names)


def _build(item: SitePass, graph: Graph, sites: Sequence[Site], context: Context) -> list[Replacement]:
    from graphopt.fit.capture import record

    torch.manual_seed(context.seed)
    records = record(graph, sites, context)
    modules = [item.build(site, context) for site in sites]
    return [Replacement(s, m, r) for s, m, r in zip(sites, modules, records, strict=True)]


def _measure(item: SitePass, replacements: Sequence[Replacement], context: Context, key: str) -> None:
    """Relative RMS error of each replacement on held-out batches: the mean, and under `worst` the largest."""
    for replacement in replacements:
        found: list[float] = []
        with torch.no_grad():
            for i in context.held_out():
                value = replacement.module(*replacement.record.inputs(i))
                found.append(difference(item.expected(replacement, i), value).rel_rms)
        replacement.errors[key] = sum(found) / len(found)
        replacement.errors["worst"] = max(found)


def _measure_again(
    item: SitePass, kept: Sequence[Replacement], reports: Sequence[SiteReport], context: Context
) -> None:
    """Training through the whole model trades errors between sites: say what each has now."""
    _measure(item, kept, context, "after_finish")
    errors = {r.site.name: r.errors for r in kept}
    for report in reports:
        if report.status == "rewritten":
            report.errors = dict(errors[report.name])


def _judge(item: SitePass, graph: Graph, replacement: Replacement, context: Context) -> SiteReport:
    """Hold the replacement against what the pass promises."""
    index = context.held_out()[0]
    expected = item.expected(replacement, index)
    with torch.no_grad():
        found = replacement.module(*replacement.record.inputs(index))
    reason = _miss(item, expected, found, replacement.errors)
    status: Status = "reverted"
    if not reason:
        status, reason = item.review(graph, replacement, context)
    return SiteReport(replacement.site.name, replacement.site.kind, status, reason, dict(replacement.errors))


def _miss(item: SitePass, expected: torch.Tensor, found: Any, errors: dict[str, float]) -> str:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return f"expected {expected.dtype}{list(expected.shape)}, the replacement gives {_shape_text(found)}"
    if bool(torch.isfinite(expected).all()) and not bool(torch.isfinite(found).all()):
        return "the replacement gives NaN or infinite values where the original does not"
    if item.equivalence is Equivalence.ARCHITECTURE:
        return ""
    tolerance: Tolerance = item.tolerance(expected.dtype)
    # A promise about every value is held on every batch; a trained approximation is as good as its mean.
    promised = item.equivalence in (Equivalence.EXACT, Equivalence.REASSOCIATED, Equivalence.CALIBRATED)
    error = errors["worst" if promised else "after_fit"]
    if not error <= tolerance.rel_rms:  # also true of NaN
        return f"relative RMS error {error:.3g} is above {tolerance.rel_rms:.3g} ({tolerance.why})"
    return ""


def _shape_text(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
