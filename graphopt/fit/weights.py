"""Weights of a graph that are trained in full, and putting new values in the place of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphopt.graph import Graph, set_attribute


class Weights:
    """Copies of some weights of a graph, to be trained beside it; the graph's own stay until `merge`."""

    def __init__(self, graph: Graph, nodes: Iterable[fx.Node]) -> None:
        """Copy what the nodes hold.

        Args:
            graph: whose weights.
            nodes: as the layers of `graphopt.sites` name them; several of one weight count once.
        """
        self._graph = graph
        self._nodes = {name_of_weight(node): node for node in nodes}
        self._copies = {
            key: torch.nn.Parameter(graph.weight(node).detach().clone()) for key, node in self._nodes.items()
        }

    def parameters(self) -> list[torch.nn.Parameter]:
        """What there is to train."""
        return list(self._copies.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The copies by name, for `graphopt.execute.execute`."""
        return dict(self._copies)

    def merge(self) -> None:
        """Make the copies the graph's own, in place; the weights that it was copied from stay."""
        for key, node in self._nodes.items():
            replace_weight(self._graph, node, self._copies[key].detach())


def name_of_weight(node: fx.Node) -> str:
    """The name by which `execute` takes another value for a weight."""
    return str(node.meta.get("onnx_name", node.target))


def replace_weight(graph: Graph, node: fx.Node, value: torch.Tensor) -> None:
    """Let everything in `graph` that reads the weight of `node` read `value`; graphs that share the weight keep theirs.

    It has the name of the old one, in a saved model too.
    """
    key = name_of_weight(node)
    users = [n for n in graph.nodes if n.op == "get_attr" and name_of_weight(n) == key]
    for target in dict.fromkeys(str(user.target) for user in users):
        path, _, last = target.rpartition(".")
        delattr(graph.module.get_submodule(path), last)  # a buffer would not make room for a parameter
        set_attribute(graph.module, target, value)
    for user in users:
        user.meta.pop("onnx", None)  # of a weight that a Constant node held
        if "onnx_name" in user.meta:
            user.meta["onnx_replaces"] = user.meta.pop("onnx_name")
    graph.module.recompile()
