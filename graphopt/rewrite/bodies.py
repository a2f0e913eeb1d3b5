"""Passes enter the bodies of control flow: each is a graph, and what enters it while the model runs is its data."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt.calibration import Calibration
from graphopt.errors import GraphOptError, NoRuntime
from graphopt.execute import execute
from graphopt.graph import Graph
from graphopt.rewrite.base import Pass, SitePass
from graphopt.rewrite.report import SiteReport
from graphopt.shapes.captured import describe_captured
from graphopt.subgraphs import SubgraphOperator, bodies_of, walk, weights_of_bodies

if TYPE_CHECKING:
    from graphopt.rewrite.context import Context


def run_everywhere(item: Pass, graph: Graph, context: Context) -> tuple[Graph, list[SiteReport]]:
    """Run a pass on a graph and on the bodies of its control flow, at any depth.

    A body is rewritten with what entered it on the calibration data: of each batch one call, chosen at random.
    """
    rewritten, sites = item.run(graph, context)
    reports = list(sites)
    if rewritten.body is None:  # that of a body was done from outside, for all levels
        describe_captured(rewritten)
    if not any(_is_worth_it(item, body) for _, _, body in bodies_of(rewritten)):
        return rewritten, reports
    student = graph.copy() if rewritten is graph else rewritten
    found, known = bodies_of(student), weights_of_bodies(student)
    recorded, obstacle = _record(student, [body for _, _, body in found], context)
    if obstacle is not None and not item.is_proven:
        raise obstacle
    changed = False
    for operator, name, body in found:
        calls = recorded[id(body)]
        if not calls and obstacle is None:
            reports += _never_ran(item, operator, name, context)
            continue
        data = Calibration(calls, f"{len(calls)} calls of {operator.extra_repr()}", context.calibration.synthetic)
        new, inner = run_everywhere(item, body, replace(context, calibration=data))
        reports += inner
        if new is not body:
            operator.set_body(name, new)
            changed = True
    if changed:
        _drop_weights(student, known - weights_of_bodies(student))
    return (student if changed or rewritten is not graph else graph), reports


def _drop_weights(graph: Graph, names: Collection[str]) -> None:
    """Drop weights that only bodies used, and use no longer."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users and node.meta.get("onnx_name") in names:
            graph.fx.erase_node(node)
    graph.module.recompile()


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


def _record(
    graph: Graph, bodies: Sequence[Graph], context: Context
) -> tuple[dict[int, list[tuple[Any, ...]]], NoRuntime | None]:
    """What bodies were run on, by the id of the body; and why the model could not be run to its end, if it could not.

    Of a graph without data (it lies behind what cannot be run) nothing is known.
    """
    obstacle: NoRuntime | None = None if len(context.calibration) else NoRuntime("no data reaches the body")
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

        try:
            with torch.no_grad():
                execute(graph, values, enter=enter)
        except NoRuntime as error:
            obstacle = error
        for key, given in chosen.items():
            kept[key].append(given)
    return kept, obstacle


def _never_ran(item: Pass, operator: SubgraphOperator, name: str, context: Context) -> list[SiteReport]:
    reason = "its loop or branch never ran on the calibration data, so a rewrite could not be checked"
    if not isinstance(item, SitePass):
        context.idle.append(f"{name} of {operator.proto.name or operator.extra_repr()}")
        return []
    sites = [site for level in walk(operator.bodies[name]) for site in item.find(level).sites]
    return [SiteReport(site.name, site.kind, "refused", reason) for site in sites]
