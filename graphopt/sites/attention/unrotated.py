"""Queries and keys before their rotary embedding, for methods whose recurrence takes no positions."""

from __future__ import annotations

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention.history import MOVING, turns
from graphopt.sites.attention.layout import Program
from graphopt.sites.attention.operands import read_along, trail
from graphopt.sites.attention.view import View
from graphopt.sites.base import Source
from graphopt.sites.vocabulary import kind, operands, source

_DEPTH = 24
_ROTATING = ("mul", "add", "sub", "neg", "concat", "stack")


def sources_of(view: View, q: fx.Node, k: fx.Node, programs: tuple[Program, Program]) -> tuple[Source, Source] | None:
    """Where queries and keys are before their rotation, and how those values become [B, H, T, D].

    Args:
        view: the graph.
        q: the input of the site that holds the rotated queries.
        k: the same for the keys, perhaps joined with those of a cache.
        programs: how the two become [B, H, T, D].
    """
    found = [_source(view, node, program) for node, program in zip((q, k), programs, strict=True)]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _source(view: View, node: fx.Node, program: Program) -> Source | None:
    """Behind the steps that only move elements; the rotated value and the one before it have the same layout."""
    links = [link for link in trail(view, node) if link.factor == 1.0]
    rotated = links[-1].given if links else node
    reading = read_along(view, rotated, links, lambda _, x: program(x))
    before = _before(view, _fresh(rotated))
    if reading is None or before is None:
        return None
    repeat = (("repeat_interleave", reading.repeats, 1),) if reading.repeats > 1 else ()
    return Source(before, reading.program.then(*repeat))


def _fresh(node: fx.Node) -> fx.Node:
    """The keys of this call, where `node` joins them with a cache."""
    parts = [p for p in operands(node) if p is not None] if kind(node) == "concat" else []
    return parts[1] if len(parts) == 2 and vocabulary.skip(parts[0], MOVING).op == "placeholder" else node


def _before(view: View, node: fx.Node) -> fx.Node | None:
    """The nearest value before a rotary embedding that has the shape of what is behind it."""
    if kind(node) == "rotary_embedding":
        return source(node)
    shapes, pending, seen = view.shapes(node), [node], {node}
    for _ in range(_DEPTH):
        above = [n for current in pending for n in _turned_parts(current) if n not in seen]
        seen.update(above)
        for candidate in above:
            if _is_before(view, candidate, shapes):
                return candidate
        pending = above
    return None


def _is_before(view: View, node: fx.Node, shapes: list[tuple[int, ...]]) -> bool:
    """Whether a value has those shapes and is no part of the rotation itself."""
    if kind(node) in _ROTATING or node.op == "get_attr":
        return False
    return all(s.shapes.get(node) == shape for s, shape in zip(view.samples, shapes, strict=True))


def _turned_parts(node: fx.Node) -> list[fx.Node]:
    """What a step of a rotary embedding is made of, without its cosines and sines."""
    parts = [p for p in operands(node) if p is not None]
    if kind(node) == "mul":
        return [p for p in parts if not turns(p)]
    if kind(node) in MOVING:
        return parts[:1]
    return parts if kind(node) in _ROTATING else []
