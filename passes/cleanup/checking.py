"""Holding each rewrite against the original graph: the values have to agree in every bit, NaN with NaN."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.errors import GraphOptError, NoRuntime
from graphopt.execute import GraphInterpreter, execute
from graphopt.graph import Graph
from graphopt.verification.numbers import difference

from .operators import random_downstream
from .workspace import Application, Workspace

# Each further batch costs two runs of the model.
BATCHES = 2
# So many differing values are run once more to measure by how much they differ.
_MOST_MEASURED = 8


# An expanded value may claim any size without taking memory.
_MOST_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Failure:
    """An application whose value differs from the original's."""

    application: Application
    reason: str
    errors: dict[str, float]


@dataclass(frozen=True)
class Check:
    """What a comparison found."""

    failures: list[Failure]
    random: int
    """Applications that random operators feed: their values differ from run to run anyway."""
    unrun: int = 0
    """Applications without a value to compare: an operator that nothing can run feeds them, or there is no data."""


def check(graph: Graph, w: Workspace, batches: Iterable[tuple[Any, ...]]) -> Check:
    """Run both graphs and compare the value of every replaced node with that of its replacement.

    Values are hashed as they appear and kept nowhere, so this needs no more memory than running the model.
    Where values differ, only those that depend on no other one are failures: the others follow from them.
    """
    pairs, random = _pairs(graph, w)
    compared: set[fx.Node] = set()
    for values in [b for b, _ in zip(batches, range(BATCHES), strict=False)] if pairs else []:
        expected = _digests(graph, values, pairs, set())
        compared.update(expected)
        done: set[fx.Node] = set()
        try:
            found = _digests(w.graph, values, {new for new, _ in pairs.values()}, done)
        except Exception as error:  # whatever an operator raises on operands that a wrong rule gave it
            stopped = next(n for n in w.graph.nodes if n not in done)
            return Check(_crashed(pairs, stopped, error), random)
        differing = [old for old, digest in expected.items() if digest != found.get(pairs[old][0])]
        if differing:
            return Check(_measured(graph, w, pairs, _first(graph, differing), values), random)
    return Check([], random, len(pairs) - len(compared))


Pairs = dict[fx.Node, tuple[fx.Node, Application]]


def _pairs(graph: Graph, w: Workspace) -> tuple[Pairs, int]:
    """Original node -> what stands for it now, and the last application to it."""
    random, present = random_downstream(graph), set(w.graph.nodes)
    pairs: Pairs = {}
    unchecked = 0
    for application in w.applications:
        new = w.resolve(application.new)
        if application.old is None or new not in present:
            continue
        if application.old in random:
            unchecked += 1
        else:
            pairs[application.old] = (new, application)
    return pairs, unchecked


class _AsFarAsPossible(GraphInterpreter):
    """Runs all but the operators that nothing can run, and what depends on those: that has no value."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, or the mark of there being none."""
        if n.op == "output" or all(self.env[each] is not _NOTHING for each in n.all_input_nodes):
            try:
                return super().run_node(n)
            except NoRuntime:
                pass
        if self._observe is not None:
            self._observe(n, _NOTHING)
        return _NOTHING


_NOTHING = object()


def _observe(graph: Graph, values: Sequence[Any], observe: Callable[[fx.Node, Any], None]) -> None:
    with torch.no_grad():
        execute(graph, values, observe, interpreter=_AsFarAsPossible)


def _digests(
    graph: Graph, values: Sequence[Any], watched: Collection[fx.Node], done: set[fx.Node]
) -> dict[fx.Node, bytes]:
    """Fingerprints of the watched nodes' values; `done` gets every node that was come to."""
    found: dict[fx.Node, bytes] = {}

    def note(node: fx.Node, value: Any) -> None:
        done.add(node)
        if node in watched and value is not _NOTHING:
            found[node] = fingerprint(value)

    _observe(graph, values, note)
    return found


def fingerprint(value: Any) -> bytes:
    """A hash of type, shape and bits, in which all NaNs are one."""
    state = hashlib.blake2b(digest_size=16)
    _feed(state.update, value)
    return state.digest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, (list, tuple)):
        update(f"{len(value)} items:".encode())
        for item in value:
            _feed(update, item)
        return
    if not isinstance(value, torch.Tensor):
        array = value if isinstance(value, np.ndarray) else None
        update(repr(value if array is None else (array.shape, array.tolist())).encode())
        return
    update(f"{value.dtype}{tuple(value.shape)}".encode())
    if value.numel() > _MOST_ELEMENTS:
        raise GraphOptError(f"cannot compare values of {list(value.shape)}, which no memory holds")
    value = value.reshape(-1)  # some operators of torch stop at 64 axes
    if value.dtype.is_floating_point and value.dtype.itemsize > 1:
        value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    data = value.detach().cpu().contiguous().reshape(-1)
    if data.numel():
        update(data.view(torch.uint8).numpy())


def _first(graph: Graph, differing: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of the differing nodes that depend on no other one."""
    wrong, spoiled, first = set(differing), set(), []
    for node in graph.nodes:
        follows = any(n in spoiled for n in node.all_input_nodes)
        if node in wrong and not follows:
            first.append(node)
        if node in wrong or follows:
            spoiled.add(node)
    return first


def _measured(graph: Graph, w: Workspace, pairs: Pairs, first: list[fx.Node], values: Sequence[Any]) -> list[Failure]:
    measured = first[:_MOST_MEASURED]
    kept: dict[fx.Node, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node in wanted and value is not _NOTHING:
            kept[node] = value

    wanted = {*measured, *(pairs[old][0] for old in measured)}
    for each in (graph, w.graph):
        _observe(each, values, keep)
    failures = []
    for old in first:
        new, application = pairs[old]
        errors = {}
        reason = "its value differs from the original's"
        if old in kept and new in kept:
            found = difference(kept[old], kept[new])
            errors = {"max_abs": found.max_abs, "rel_rms": found.rel_rms}
            reason += f": largest difference {found.max_abs:.3g}, relative RMS {found.rel_rms:.3g}"
        failures.append(Failure(application, reason, errors))
    return failures


def _crashed(pairs: Pairs, stopped: fx.Node, error: Exception) -> list[Failure]:
    """Blame the replacement that could not run, else those whose values it was given, else all before it."""
    by_new = {new: application for new, application in pairs.values()}
    pending = [stopped]
    blamed: list[Application] = []
    seen: set[fx.Node] = set()
    while pending and not blamed:
        blamed = [by_new[node] for node in pending if node in by_new]
        seen.update(pending)
        pending = [n for node in pending for n in node.all_input_nodes if n not in seen]
    reason = f"the rewritten graph cannot be run: {error}"
    return [Failure(application, reason, {}) for application in blamed or by_new.values()]
