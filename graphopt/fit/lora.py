"""Low-rank adapters on linear layers, trained beside the weights and merged into them: W + (alpha / r) B A.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.fit.weights import name_of_weight, replace_weight
from graphopt.graph import Graph
from graphopt.sites import LinearSite, find

Targets = Literal["qkvo", "qkv", "o", "all"]
# A product of positions with rotary frequencies is a linear layer by form only.
_NARROWEST = 4


@dataclass(eq=False)
class Adapter:
    """One adapted weight; `down` [in, r] and `up` [r, out] start at a change of zero."""

    weight: fx.Node
    transposed: bool
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    scale: float

    def change(self) -> torch.Tensor:
        """What is added to the weight, in the weight's own layout."""
        product = self.scale * (self.down @ self.up)
        return product if self.transposed else product.transpose(0, 1)


class Adapters:
    """The adapters of a graph."""

    def __init__(self, graph: Graph, layers: Iterable[LinearSite], rank: int, alpha: float, seed: int = 0) -> None:
        """Put an adapter on each weight of `layers`; a weight that several layers share has one.

        Args:
            graph: whose layers.
            layers: as `graphopt.sites.find(graph, "linear")` finds them.
            rank: r.
            alpha: the change is scaled by alpha / r.
            seed: of the initial `down`.
        """
        self._graph = graph
        generator = torch.Generator().manual_seed(seed)
        self.items: dict[str, Adapter] = {}
        for layer in layers:
            key = name_of_weight(layer.weight)
            if key in self.items:
                continue
            # As published: A is uniform as a linear layer's weight is, B is zero.
            bound = 1 / math.sqrt(layer.in_features)
            down = torch.empty(layer.in_features, rank).uniform_(-bound, bound, generator=generator)
            self.items[key] = Adapter(
                layer.weight,
                layer.transposed,
                torch.nn.Parameter(down),
                torch.nn.Parameter(torch.zeros(rank, layer.out_features)),
                alpha / rank,
            )

    def parameters(self) -> list[torch.nn.Parameter]:
        """What there is to train."""
        return [p for a in self.items.values() for p in (a.down, a.up)]

    def weights(self) -> dict[str, torch.Tensor]:
        """The adapted weights by name, for `graphopt.execute.execute`; differentiable."""
        return {key: self._adapted(adapter) for key, adapter in self.items.items()}

    def merge(self) -> None:
        """Make the adapted weights the graph's own, in place; the weights that it was copied from stay."""
        with torch.no_grad():
            for adapter in self.items.values():
                replace_weight(self._graph, adapter.weight, self._adapted(adapter).contiguous())

    def _adapted(self, adapter: Adapter) -> torch.Tensor:
        weight: torch.Tensor = self._graph.weight(adapter.weight)
        return weight + adapter.change().to(weight.dtype)


def layers_around(graph: Graph, names: Sequence[str], targets: Targets) -> list[LinearSite]:
    """The linear layers that feed rewritten sites and that read them.

    Args:
        graph: after rewriting; new nodes carry the name of their site.
        names: of the sites.
        targets: `qkv` feeds a site, `o` reads it; `all` is every linear layer of the graph.
    """
    layers: list[LinearSite] = [s for s in find(graph, "linear").sites if s.in_features >= _NARROWEST]
    if targets == "all":
        return layers
    wanted = set(names)
    owners = {node: layer for layer in layers for node in layer.nodes}
    new = [n for n in graph.nodes if n.meta.get("graphopt_site") in wanted]
    found: dict[str, LinearSite] = {}
    if "qkv" in targets:
        found.update((s.name, s) for s in _nearest(new, owners, lambda n: n.all_input_nodes))
    if "o" in targets:
        found.update((s.name, s) for s in _nearest(new, owners, lambda n: list(n.users)))
    return [layer for layer in layers if layer.name in found]


def _nearest(
    start: Iterable[fx.Node], owners: dict[fx.Node, LinearSite], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> Iterator[LinearSite]:
    """The first layers on every way from `start`."""
    pending = list(start)
    seen = set(pending)
    while pending:
        for other in step(pending.pop()):
            if other in seen:
                continue
            seen.add(other)
            if other in owners:
                yield owners[other]
            else:
                pending.append(other)
