"""`graphopt explain`: what a pass would rewrite in a model, and why it refuses the rest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.shared import Debug, Json, Model, Quiet, check_input
from graphopt.cli.terminal import Terminal
from graphopt.errors import GraphOptError

if TYPE_CHECKING:
    from torch import fx

    from graphopt.graph import Graph
    from graphopt.rewrite.base import SitePass


def explain(
    model: Model,
    pass_: Annotated[
        str, typer.Option("--pass", metavar="PASS", help="A pass as for `transform`.", show_default=False)
    ],
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NAME", help="Only what covers this node or site.", show_default=False),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say which sites a pass would rewrite and why it refuses the others; nothing is rewritten.

    Example: `graphopt explain model.onnx --pass linearize --node /layer.0/attention/Softmax`
    """
    terminal = Terminal(json, quiet)
    terminal.reserve(model)
    from graphopt.rewrite.base import SitePass
    from graphopt.rewrite.options import parse, spell
    from graphopt.rewrite.report import environment

    item = parse(pass_)
    check_input(model)
    from graphopt.api import load

    graph = load(model)
    data: dict[str, Any] = {
        "version": 1,
        "model": str(model),
        "pass": spell(item),
        "environment": environment(),
    }
    if not isinstance(item, SitePass):
        if node is not None:
            nodes_called(graph, node)
        terminal.print(
            f"{item.name} works on the whole graph, so there are no sites to explain; "
            "`graphopt transform` shows what it does"
        )
        terminal.json({**data, "sites": []})
        return
    sites = explained(item, graph)
    if node is not None:
        sites = _about(graph, node, sites, item.kind, terminal)
    _show(terminal, spell(item), item.kind, sites, one=node is not None)
    terminal.json({**data, "sites": [_plain(site) for site in sites]})


def explained(item: SitePass, graph: Graph) -> list[dict[str, Any]]:
    """Every candidate with its status; `covers` holds the fx nodes and is left out of the JSON."""
    from graphopt.shapes.captured import describe_captured
    from graphopt.sites import Findings
    from graphopt.subgraphs import walk

    describe_captured(graph)
    found = [item.find(level) for level in walk(graph)]
    findings = Findings(tuple(s for f in found for s in f.sites), tuple(r for f in found for r in f.refusals))
    rows: list[dict[str, Any]] = []
    for site in findings.sites:
        reason = item.check(site)
        status = "accepted" if reason is None else "refused"
        rows.append(
            {
                "name": site.name,
                "kind": site.kind,
                "status": status,
                "reason": reason or "",
                "covers": site.nodes,
            }
        )
    for refusal in findings.refusals:
        rows.append(
            {
                "name": refusal.node,
                "kind": refusal.kind,
                "status": "refused",
                "reason": refusal.reason,
                "covers": (),
            }
        )
    return rows


def node_names(node: fx.Node) -> set[str]:
    """All names that a user may know an fx node by: its own, the source node's, the value's."""
    origin = node.meta.get("onnx")
    names = {node.name, node.meta.get("onnx_name"), origin.proto.name if origin is not None else None}
    return {name for name in names if name}


def nodes_called(graph: Graph, name: str) -> list[fx.Node]:
    """The nodes with that name.

    Raises:
        GraphOptError: there is none; near names are suggested.
    """
    named = {node: node_names(node) for node in graph.nodes}
    found = [node for node, names in named.items() if name in names]
    if found:
        return found
    known: Iterable[str] = dict.fromkeys(n for names in named.values() for n in sorted(names))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`graphopt inspect` lists the operators"
    raise GraphOptError(f"no node is called {name!r}; {hint}")


def _about(graph: Graph, name: str, sites: list[dict[str, Any]], kind: str, terminal: Terminal) -> list[dict[str, Any]]:
    """The sites that are called `name` or cover the node of that name."""
    chosen = [site for site in sites if site["name"] == name]
    if chosen:
        return chosen
    nodes = nodes_called(graph, name)
    aliases = {alias for node in nodes for alias in node_names(node)}
    chosen = [site for site in sites if site["name"] in aliases or set(nodes) & set(site["covers"])]
    if not chosen:
        terminal.print(f"node {name!r} is part of no {kind} candidate: no finder took it for one")
    return chosen


def _show(terminal: Terminal, spelled: str, kind: str, sites: list[dict[str, Any]], *, one: bool) -> None:
    if not sites:
        if not one:
            terminal.print(f"{spelled}: the model has no {kind} site, and nothing that looks like one")
        return
    accepted = sum(site["status"] == "accepted" for site in sites)
    title = f"{spelled}: {accepted} of {len(sites)} {kind} candidates would be rewritten"
    rows = ((site["name"], site["status"], site["reason"]) for site in sites)
    terminal.table(title, ("site", "status", "reason"), rows)


def _plain(site: dict[str, Any]) -> dict[str, Any]:
    nodes = [node.meta.get("onnx_name", node.name) for node in site["covers"]]
    return {**{key: value for key, value in site.items() if key != "covers"}, "nodes": nodes}
