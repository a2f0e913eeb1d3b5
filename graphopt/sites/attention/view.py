"""What the attention finder knows of a graph: two observed samples, numbers, and who uses what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.sites import vocabulary
from graphopt.sites.base import Mask
from graphopt.sites.samples import Sample, observed


class RefusedError(Exception):
    """A candidate is no attention, and why."""


@dataclass
class View:
    """A graph with what running it on samples of two different sizes showed."""

    graph: Graph
    samples: list[Sample]
    order: dict[fx.Node, int] = field(init=False)
    verdicts: dict[Any, Mask] = field(default_factory=dict)
    """Masks that were evaluated: the layers of a model share theirs."""
    dead: set[fx.Node] = field(init=False)
    """Nodes that no output depends on: what they read is not used by them."""

    def __post_init__(self) -> None:
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.dead = set(self.order) - vocabulary.ancestors(n for n in self.order if n.op == "output")

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read `node` and are themselves of use."""
        return [u for u in node.users if u not in self.dead]

    @classmethod
    def of(cls, graph: Graph, wanted: Iterable[fx.Node]) -> View:
        """Run what `wanted` depends on; one sample is enough where no size is symbolic.

        Raises:
            RefusedError: no input can be made for the model.
        """
        wanted = list(wanted)
        try:
            first = observed(graph, wanted, 0)
            second = observed(graph, wanted, 1) if first.sizes else None
        except GraphOptError as error:
            raise RefusedError(f"the model cannot be run on sample inputs: {error}") from error
        return cls(graph, [first] if second is None else [first, second])

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """The shape of a value on each sample.

        Raises:
            RefusedError: it was not computed.
        """
        missing = [s for s in self.samples if node not in s.shapes]
        if missing:
            reason = next(iter(missing[0].errors.values()), "it is no tensor")
            raise RefusedError(
                f"the shape of {vocabulary.name_of(node)} is not known: {reason.strip().splitlines()[0]}"
            )
        return [s.shapes[node] for s in self.samples]

    def rank(self, node: fx.Node) -> int:
        """The number of axes of a value."""
        return len(self.shapes(node)[0])

    def number(self, value: object) -> float | None:
        """A number, a constant of one element, or such a value that depends on sizes only."""
        known = vocabulary.scalar(self.graph, value)
        if known is not None or not isinstance(value, fx.Node):
            return known
        found = [s.small.get(value) for s in self.samples]
        if any(v is None or (isinstance(v, torch.Tensor) and v.numel() != 1) for v in found):
            return None
        if vocabulary.depends_on_values(value):
            return None
        numbers = {float(v.item() if isinstance(v, torch.Tensor) else v) for v in found if v is not None}
        return numbers.pop() if len(numbers) == 1 else None

    def far_below(self, value: object, limit: float) -> bool:
        """Whether a fill value hides what it is put on: constant and at most `limit` everywhere."""
        number = self.number(value)
        if number is not None:
            return number <= limit
        if not isinstance(value, fx.Node) or vocabulary.depends_on_values(value):
            return False
        known = vocabulary.constant(self.graph, value)
        if known is None:
            known = self.samples[0].values([value], self.samples[0].sizes_known()).get(value)
        return isinstance(known, torch.Tensor) and known.numel() > 0 and bool((known <= limit).all())

    def zero(self, value: object) -> bool:
        """Whether a value is 0 everywhere."""
        if self.number(value) == 0.0:
            return True
        if not isinstance(value, fx.Node) or vocabulary.depends_on_values(value):
            return False
        known = self.samples[0].values([value], self.samples[0].sizes_known()).get(value)
        return isinstance(known, torch.Tensor) and not bool(known.any())


def is_output(node: fx.Node) -> bool:
    """Whether the model returns the value."""
    return any(u.op == "output" for u in node.users)
