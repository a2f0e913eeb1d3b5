"""Applying the table until nothing fits any more, in sweeps in the order of execution."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from graphopt.graph import Graph

from . import rules
from .cse import merge_equal, merge_weights
from .folding import Folder
from .workspace import Key, Workspace

# Each round costs one linear sweep; real models settle within four.
_MOST_ROUNDS = 16
# A replacement is itself looked at again at once, and its replacement, up to here.
_MOST_STEPS = 16


@dataclass(frozen=True)
class Settings:
    """The options of the pass as far as they decide what is rewritten."""

    chosen: Collection[str]
    fold_limit: int
    fold_inexact: bool
    only: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Rewritten:
    """The outcome of all sweeps."""

    workspace: Workspace
    dead: int
    """Nodes and weights that the original graph had without any use."""
    refusals: dict[fx.Node, str]


def rewrite(graph: Graph, settings: Settings, excluded: Iterable[Key] = ()) -> Rewritten:
    """Apply the chosen rules to a copy of the graph."""
    folder = Folder(settings.fold_limit, settings.fold_inexact)
    w = Workspace(graph, folder, excluded, settings.only)
    dead = 0
    if "dead-node" in settings.chosen and not settings.only:
        dead = w.erase_dead()
    else:
        w.keep_dead()
    table = rules.by_operator(tuple(settings.chosen))
    refusals: dict[fx.Node, str] = {}
    for _ in range(_MOST_ROUNDS):
        w.forget()
        before = len(w.applications)
        for node in list(w.graph.nodes):
            _visit(w, table, node)
        w.erase_dead()
        _merge(w, settings.chosen)
        w.erase_dead()
        refusals = _fold(w) if "fold" in settings.chosen else {}
        w.erase_dead()
        if len(w.applications) == before:
            break
    return Rewritten(w, dead, refusals)


def _merge(w: Workspace, chosen: Collection[str]) -> None:
    if "merge-weights" in chosen:
        merge_weights(w)
    merge_equal(w, chosen)


def _visit(w: Workspace, table: dict[str, list[rules.Rule]], node: fx.Node) -> None:
    w.facts.learn(node)
    for _ in range(_MOST_STEPS):
        new = _rewritten(w, table, node)
        if new is None or not w.made(new):
            return
        node = new


def _rewritten(w: Workspace, table: dict[str, list[rules.Rule]], node: fx.Node) -> fx.Node | None:
    for rule in rules.matching(table, node):
        if not w.allows(rule.name, node):
            continue
        try:
            new = rule.apply(w, node)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # a required operand is missing, or an attribute makes no sense: no rule applies
        if new is not None and w.replace(rule.name, node, new, f"{rule.pattern} -> {rule.replacement}"):
            return new
    return None


def _fold(w: Workspace) -> dict[fx.Node, str]:
    """Store constants where something that is not constant uses them; those in between then have no use.

    Returns:
        Why others were not stored.
    """
    refusals = dict(w.folder.refusals)
    storable = set()
    for node in w.graph.nodes:
        value = w.fact(node).value
        if node.op != "call_function" or value is None or node in w.results or not w.allows("fold", node):
            continue
        reason = w.folder.keeps_small(node, value, _freed(w, node))
        if reason is None:
            storable.add(node)
        else:
            refusals[node] = reason
    for node in list(w.graph.nodes):
        if node in storable and not storable.issuperset(node.users):
            value = w.fact(node).value
            assert value is not None
            w.replace("fold", node, w.weight(node, value), "its value is the same for all inputs")
    return refusals


def _freed(w: Workspace, node: fx.Node) -> int:
    """Bytes of the constant operands that nothing else uses."""
    values = [w.fact(n).value for n in node.all_input_nodes if len(n.users) == 1]
    return sum(v.nbytes for v in values if v is not None)
