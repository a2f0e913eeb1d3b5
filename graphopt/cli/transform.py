"""`graphopt transform`: rewrite a model, check what that did, and write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import costs
from graphopt.cli.saving import Check, check_data, check_paths, default_output, file_facts, save_checked
from graphopt.cli.shared import (
    Calib,
    Debug,
    Dims,
    Model,
    Quiet,
    Seed,
    calibration,
    check_dims,
    check_input,
    check_runs,
    single_dims,
)
from graphopt.cli.terminal import Terminal, number, size
from graphopt.cli.verify import show_outputs
from graphopt.errors import CheckFailed, GraphOptError, NothingToRewrite

if TYPE_CHECKING:
    from graphopt.rewrite.base import Pass
    from graphopt.rewrite.report import PassReport, Report, SiteReport

_CLEANUP = "cleanup"
# A pass with more sites than this, and no measured errors to show, is summed up by kind.
_LISTED = 12
# Relative RMS errors on held-out batches.
_ERRORS = {
    "before_fit": "before fit",
    "after_fit": "after fit",
    "after_finish": "after end-to-end",
    "worst": "worst batch",
}


def transform(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where to write.", show_default="MODEL.PASS.onnx"),
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="PASS", help='As in "linearize{fit_steps=500}"; repeatable, run in order.'),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option("--pipeline", metavar="FILE.toml", help='A file with passes = ["cleanup", ...]; they run first.'),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="SITE", help="Rewrite only this site; repeatable.")
    ] = None,
    fit_steps: Annotated[
        int | None,
        typer.Option("--fit-steps", min=0, help="Training steps in place of the passes' own; 0 skips training."),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option("--min-cosine", min=-1, max=1, help="Smallest mean cosine of every output that passes."),
    ] = None,
    target: Annotated[str, typer.Option("--target", help="What to write for: onnx, onnxruntime, torch, ...")] = "onnx",
    external_data: Annotated[bool, typer.Option("--external-data", help="Put the weights into OUT.data.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    allow_noop: Annotated[
        bool, typer.Option("--allow-noop", help="Also write a model in which nothing was rewritten.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--json", "--report", metavar="FILE", help="Write the report as JSON; `-` for standard output."),
    ] = None,
    calib: Calib = None,
    dim: Dims = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model with passes, verify every rewrite, and write the result beside it.

    Nothing is written when a check fails (exit code 1) or when there is nothing to rewrite (exit code 3).

    Example: `graphopt transform model.onnx --pass "linearize{fit_steps=500}" --calib data.npz`
    """
    terminal = Terminal(report, quiet)
    check_input(model)
    sizes = single_dims(dim)
    if out is not None:
        check_paths(model, out, force=force)
    items = _passes(pass_, pipeline)
    _check_target(target, external_data)
    out = out or default_output(model, [item.name for item in items], target)
    check_paths(model, out, force=force)
    terminal.reserve(model, out)
    from graphopt.api import load
    from graphopt.states import completed

    graph = load(model)
    check_dims(graph, sizes)
    check_data(graph.onnx, out, external=external_data, force=force)
    with terminal.progress() as bars:
        fitting = any(item.needs_calibration for item in items)
        data = calibration(graph, calib, seed, sizes, fitting=fitting, bars=bars)
    check_runs(graph, data, items)
    with terminal.progress() as bars:
        try:
            result = graph.apply(
                items,
                calibration=data,
                seed=seed,
                fit_steps=fit_steps,
                only=tuple(only or ()),
                min_cosine=min_cosine,
                sizes=sizes,
                track=bars.track,
            )
        except CheckFailed as error:
            bars.stop()
            if error.report is not None:
                error.report.input = file_facts(model)
                terminal.json(error.report.to_dict())
                _show_sites(terminal, error.report)
            raise
        found = result.report
        found.input = file_facts(model)
        check = Check()
        try:
            _demand(found, allow_noop=allow_noop)
            with bars.step("Measuring the cost"):
                found.cost = {"before": costs.of(graph, sizes), "after": costs.of(result.graph, sizes)}
            with bars.step("Writing and checking the file"):
                values = completed(result.graph, graph.inputs, data.batches[0])
                check = save_checked(result.graph, out, values, target=target, external=external_data, force=force)
            if check.note:
                found.notes.append(check.note)
            found.output = file_facts(out)
        except (CheckFailed, NothingToRewrite):
            # What happened at each site is what the user now wants to see.
            bars.stop()
            terminal.json(found.to_dict())
            _show_sites(terminal, found)
            raise
    terminal.json(found.to_dict())
    _show(terminal, found, check, target)


def _passes(given: Sequence[str] | None, pipeline: Path | None) -> list[Pass]:
    from graphopt.rewrite.options import parse_all, read_pipeline

    spelled = [*(read_pipeline(pipeline) if pipeline is not None else ()), *(given or ())]
    if not spelled:
        raise GraphOptError(
            "expected at least one pass, got none; give --pass NAME or --pipeline FILE "
            "(`graphopt passes` lists the passes)"
        )
    return parse_all(spelled)


def _check_target(target: str, external_data: bool) -> None:
    from graphopt import registry

    registry.backend(target)
    if external_data and target == "torch":
        raise GraphOptError("expected an ONNX target for --external-data, got --target torch; drop one of them")


def telling(report: Report) -> list[PassReport]:
    """The passes that the run was for: cleanup counts only where it is alone."""
    return [each for each in report.passes if each.name != _CLEANUP] or report.passes


def _demand(report: Report, *, allow_noop: bool) -> None:
    """Raise where there is nothing worth writing."""
    passes = telling(report)
    if any(each.count("rewritten") for each in passes):
        return
    names = " and ".join(dict.fromkeys(each.name for each in passes))
    sites = [site for each in passes for site in each.sites]
    reverted = [site for site in sites if site.status == "reverted"]
    if reverted:
        raise CheckFailed(
            f"{names} rewrote nothing that passed verification: all {len(reverted)} candidates were reverted "
            f"(first {_spell(reverted[0])}); nothing was written"
        )
    if allow_noop:
        report.notes.append(f"{names} found nothing to rewrite; the model was written because of --allow-noop")
        return
    why = f"all {len(sites)} candidates were refused (first {_spell(sites[0])})" if sites else "there is no candidate"
    raise NothingToRewrite(f"{names} found nothing to rewrite: {why}; give --allow-noop to write the model anyway")


def _spell(site: SiteReport) -> str:
    return f"{site.name}: {site.reason}" if site.reason else site.name


def _show(terminal: Terminal, report: Report, check: Check, target: str) -> None:
    _show_sites(terminal, report)
    if report.unverified:
        terminal.print(f"note: {report.unverified}\n", style="yellow")
    show_outputs(
        terminal,
        f"Verification on {report.samples} input sets, the original against the rewritten graph",
        report.outputs,
    )
    if check.outputs:
        show_outputs(terminal, "The written file on onnxruntime, against the rewritten graph", check.outputs)
    _show_cost(terminal, report.cost["before"], report.cost["after"])
    for each in report.passes:
        for note in each.notes:
            terminal.print(f"note: {each.name}: {note}")
    for note in report.notes:
        if note != report.unverified:
            terminal.print(f"note: {note}")
    for each in telling(report):
        if not each.count("rewritten"):
            terminal.print(f"note: {each.name} found nothing to rewrite")
    facts: dict[str, Any] = report.output
    total = facts["bytes"] + facts.get("external_bytes", 0)
    terminal.print(f"wrote {facts['path']} ({size(total)}, target {target})", style="bold")


def _show_cost(terminal: Terminal, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    title = f"Cost {costs.at(before)}" if before.get("sizes") else "Cost"
    columns = ("", "before>", "after>", "ratio>", "expression before", "after")
    terminal.table(title, columns, costs.rows(before, after))
    for note in dict.fromkeys((*costs.notes(before), *costs.notes(after))):
        terminal.print(f"note: {note}")


def _show_sites(terminal: Terminal, report: Report) -> None:
    for spelled, each in zip(report.pipeline, report.passes, strict=True):
        counts = ", ".join(f"{each.count(s)} {s}" for s in ("rewritten", "refused", "reverted") if each.count(s))
        title = f"{spelled} ({each.equivalence}, {each.seconds:.1f} s): {counts or 'no candidate'}"
        if not each.sites:
            terminal.print(title, style="bold")
            terminal.print()
            continue
        if len(each.sites) > _LISTED and not any(site.errors for site in each.sites):
            terminal.table(
                f"{title} (each in the JSON report)", ("kind", "status", "count>", "first reason"), _by_kind(each)
            )
            continue
        measured = {key for site in each.sites for key in site.errors}
        shown = [key for key in _ERRORS if key in measured]
        columns = ("site", "kind", "status", *(f"{_ERRORS[key]}>" for key in shown), "reason")
        terminal.table(title, columns, (_cells(site, shown) for site in each.sites))


def _by_kind(report: PassReport) -> list[list[str]]:
    """One row for all sites of a kind that ended alike, the most frequent first."""
    groups: dict[tuple[str, str], list[SiteReport]] = {}
    for site in report.sites:
        groups.setdefault((site.kind, site.status), []).append(site)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [[kind, status, str(len(sites)), sites[0].reason] for (kind, status), sites in ordered]


def _cells(site: SiteReport, shown: Sequence[str]) -> list[str]:
    errors = (site.errors.get(key) for key in shown)
    return [site.name, site.kind, site.status, *("" if e is None else number(e) for e in errors), site.reason]
