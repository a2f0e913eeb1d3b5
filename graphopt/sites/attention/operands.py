"""From the operands of the products back to queries, keys and values: transposes, scales, repeated heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.execute import GraphInterpreter
from graphopt.sites import vocabulary
from graphopt.sites.attention.layout import Program, Reading, read
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.vocabulary import argument, kind

_LAYOUT = frozenset(
    {
        "reshape",
        "transpose",
        "unsqueeze",
        "squeeze",
        "identity",
        "expand",
        "tile",
        "repeat_interleave",
        "cast",
    }
    | {"gather", "concat", "select"}
)
_REPEATING = frozenset({"expand", "tile", "repeat_interleave", "gather", "concat"})
_DEPTH = 12

Canonical = Callable[[int, torch.Tensor], torch.Tensor]
"""Brings the value of an operand on the sample of that number to [B, H, T, D]."""


@dataclass(frozen=True)
class Link:
    """One step back: `node` is made of `given` by moving elements, times `factor`."""

    node: fx.Node
    given: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Operand:
    """A value that enters the site, how it becomes [B, H, T, D], and what was passed to get there."""

    node: fx.Node
    program: Program
    repeats: int
    factor: float
    passed: tuple[fx.Node, ...]


def trail(view: View, node: fx.Node) -> list[Link]:
    """The steps back from `node` through what only moves elements or multiplies them by a number."""
    links: list[Link] = []
    while len(links) < _DEPTH:
        link = _link(view, node)
        if link is None:
            break
        links.append(link)
        node = link.given
    return links


def _link(view: View, node: fx.Node) -> Link | None:
    name = kind(node)
    if name in ("mul", "div"):
        return _factor(view, node, name)
    if name not in _LAYOUT or (name == "cast" and vocabulary.narrows(node)):
        return None
    data = [n for n in vocabulary.value_parents(node) if vocabulary.depends_on_values(n)]
    if len(data) != 1 or (name != "concat" and vocabulary.source(node) is not data[0]):
        return None
    return Link(node, data[0])


def _factor(view: View, node: fx.Node, name: str) -> Link | None:
    a, b = argument(node, 0, "self"), argument(node, 1, "other")
    for value, other in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        number = view.number(other)
        if number is not None and number != 0 and isinstance(value, fx.Node):
            return Link(node, value, 1 / number if name == "div" else number)
    return None


def operand(
    view: View,
    node: fx.Node,
    canonical: Canonical,
    closed: Callable[[fx.Node], bool],
) -> Operand:
    """Find where a site's operand starts: before the first scale, repeat or transpose of its own.

    Args:
        view: the graph.
        node: the operand of the product.
        canonical: brings its value to [B, H, T, D].
        closed: whether a node may lie inside of the site because nothing outside uses it.

    Raises:
        RefusedError: its layout cannot be read.
    """
    for links in _cuts(trail(view, node), closed):
        start = links[-1].given if links else node
        reading = read_along(view, start, links, canonical)
        if reading is not None:
            factor = 1.0
            for link in links:
                factor *= link.factor
            return Operand(start, reading.program, reading.repeats, factor, tuple(x.node for x in links))
    raise RefusedError(f"the layout of {vocabulary.name_of(node)} {view.shapes(node)[0]} is not [B, H, T, D]")


def _cuts(links: Sequence[Link], closed: Callable[[fx.Node], bool]) -> Iterator[Sequence[Link]]:
    """Ways to cut the trail, longest first; each ends with a step that belongs to attention."""
    allowed = 0
    for i, link in enumerate(links):
        if not closed(link.node):
            break
        allowed = i + 1
    for length in range(allowed, 0, -1):
        last = links[length - 1]
        adjacent = length == 1 and kind(last.node) == "transpose"
        if last.factor != 1.0 or kind(last.node) in _REPEATING or adjacent:
            yield links[:length]
    yield []


def read_along(
    view: View,
    start: fx.Node,
    links: Sequence[Link],
    canonical: Canonical,
) -> Reading | None:
    """How `start` becomes what `canonical` makes of the other end of `links`; None where no program does that."""
    try:
        sources = view.shapes(start)
        wanted = [canonical(i, moved(view, i, start, links)) for i in range(len(view.samples))]
    except (RefusedError, GraphOptError, RuntimeError, NotImplementedError, KeyError):
        return None  # the steps cannot be followed: the operand starts later
    return read(sources, wanted)


def moved(view: View, sample: int, start: fx.Node, links: Sequence[Link]) -> torch.Tensor:
    """Where each element of `start` goes on the way along `links`, as the index of that element."""
    shape = view.samples[sample].shapes[start]
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    value: torch.Tensor = index
    interpreter = GraphInterpreter(view.graph)
    for link in reversed(links):
        if link.factor != 1.0 or kind(link.node) in ("cast", "identity", "mul", "div"):
            continue
        interpreter.env = _surroundings(view, sample, link)
        interpreter.env[link.given] = value
        with torch.no_grad():
            value = interpreter.run_node(link.node)
    return value


def _surroundings(view: View, sample: int, link: Link) -> dict[fx.Node, Any]:
    others = [n for n in link.node.all_input_nodes if n is not link.given]
    known = view.samples[sample]
    found: dict[fx.Node, Any] = {n: known.small[n] for n in others if n in known.small}
    missing = [n for n in others if n not in found]
    if missing:
        found.update(known.values(missing, known.sizes_known()))
    return found


def head_counts(view: View, nodes: Iterable[fx.Node], widths: Sequence[int]) -> Iterator[int]:
    """Candidates for the number of heads where batch and heads share an axis: from the reshapes around.

    Args:
        view: the graph.
        nodes: the operands and the result of the products.
        widths: the size of one head in each of them.
    """
    for node, width in zip(nodes, widths, strict=True):
        yield from _around(view, [link.given for link in trail(view, node)], width)
        yield from _around(view, _onwards(node), width)


def _around(view: View, nodes: Iterable[fx.Node], width: int) -> Iterator[int]:
    for node in nodes:
        shapes = [s.shapes.get(node) for s in view.samples]
        first = shapes[0]
        if first is None:
            return
        if len(first) == 4 and width in first[-2:]:
            yield from (d for d in (first[1], first[2]) if all(s is not None and d in s for s in shapes))
        if len(first) in (2, 3) and first[-1] % width == 0 and first[-1] > width:
            yield first[-1] // width


def _onwards(node: fx.Node) -> Iterator[fx.Node]:
    for _ in range(_DEPTH):
        users = [u for u in node.users if kind(u) in _LAYOUT]
        if len(users) != 1:
            return
        node = users[0]
        yield node
