"""Passes enter the bodies of control flow: each is a graph, and what enters it while the model runs is its data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt.calibration import Calibration
from graphopt.errors import GraphOptError
from graphopt.execute import execute
from graphopt.graph import Graph
from graphopt.rewrite.base import Pass, SitePass
from graphopt.rewrite.report import SiteReport
from graphopt.shapes.captured import describe_captured
from graphopt.subgraphs import bodies_of, walk

if TYPE_CHECKING:
    from graphopt.rewrite.context import Context


def run_everywhere(item: Pass, graph: Graph, context: Context) -> tuple[Graph, list[SiteReport]]:
    """Run a pass on a graph and on the bodies of its control flow, at any depth.

    A body is rewritten with what entered it on the calibration data: of each batch one call, chosen at random.
    """
    rewritten, sites = item.run(graph, context)
    reports = list(sites)
    describe_captured(rewritten)
    if not any(_is_worth_it(item, body) for _, _, body in bodies_of(rewritten)):
        return rewritten, reports
    student = graph.copy() if rewritten is graph else rewritten
    found = bodies_of(student)
    recorded = _record(student, [body for _, _, body in found], context)
    changed = False
    for operator, name, body in found:
        calls = recorded[id(body)]
        if not calls:
            reports += _never_ran(item, body)
            continue
        data = Calibration(calls, f"{len(calls)} calls of {operator.extra_repr()}", context.calibration.synthetic)
        new, inner = run_everywhere(item, body, replace(context, calibration=data))
        reports += inner
        if new is not body:
            operator.set_body(name, new)
            changed = True
    return (student if changed or rewritten is not graph else graph), reports


def check_names(item: Pass, graph: Graph, names: Sequence[str]) -> None:
    """Check that each of `names` is a site of the pass, in whichever body.

    Raises:
        GraphOptError: one is not.
    """
    if not names or not isinstance(item, SitePass):
        return
    describe_captured(graph)
    known = [site.name for level in walk(graph) for site in item.find(level).sites]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise GraphOptError(f"no site is called {unknown[0]!r}; there are {', '.join(known) or 'none'}")


def _is_worth_it(item: Pass, body: Graph) -> bool:
    """Whether a site pass finds anything here or below; recording costs a run of the model."""
    if not isinstance(item, SitePass):
        return True
    return any(found.sites or found.refusals for found in map(item.find, walk(body)))


def _record(graph: Graph, bodies: Sequence[Graph], context: Context) -> dict[int, list[tuple[Any, ...]]]:
    kept: dict[int, list[tuple[Any, ...]]] = {id(body): [] for body in bodies}
    choice = random.Random(context.seed)
    for values in context.track(context.calibration, len(context.calibration), "Recording loops and branches"):
        calls = dict.fromkeys(kept, 0)
        chosen: dict[int, tuple[Any, ...]] = {}

        def enter(body: Graph, given: Sequence[Any], calls: Any = calls, chosen: Any = chosen) -> None:
            if id(body) not in calls:
                return
            calls[id(body)] += 1
            if choice.randrange(calls[id(body)]) == 0:
                chosen[id(body)] = tuple(given)

        with torch.no_grad():
            execute(graph, values, enter=enter)
        for key, given in chosen.items():
            kept[key].append(given)
    return kept


def _never_ran(item: Pass, body: Graph) -> list[SiteReport]:
    reason = "its loop or branch never ran on the calibration data, so a rewrite could not be checked"
    sites = [site for level in walk(body) for site in item.find(level).sites] if isinstance(item, SitePass) else []
    return [SiteReport(site.name, site.kind, "refused", reason) for site in sites]
