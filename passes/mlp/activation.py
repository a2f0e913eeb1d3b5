"""The activation inside an MLP as a site of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphopt.graph import Graph
from graphopt.sites import Findings, MlpSite, Refusal, Site, mlp
from graphopt.sites.regions import Scope
from graphopt.sites.vocabulary import name_of


@dataclass(frozen=True, eq=False)
class ActivationSite(Site):
    """A pointwise function of one value [.., C], between the linear layers of an MLP.

    Attributes:
        function: its name, as `graphopt.sites.mlp.activation` takes it.
        channels: C.
        bias: what the activation's own operator adds first [C], None where it adds nothing.
        mlp: the MLP around it.
    """

    kind = "mlp"
    function: str = field(kw_only=True)
    channels: int = field(kw_only=True)
    bias: torch.Tensor | None = field(default=None, kw_only=True)
    mlp: MlpSite = field(kw_only=True)


def activations(graph: Graph) -> Findings:
    """The activations of all MLPs of `graph`, under the names of these MLPs, and what was refused."""
    found = mlp.find(graph, overlapping=True)
    scope = Scope(graph)
    sites, refusals = [], list(found.refusals)
    for around in found.sites:
        site = _site(scope, around)
        if site is None:
            reason = "its activation reads more than one value"
            refusals.append(Refusal("mlp", name_of(around.anchor), reason))
        else:
            sites.append(site)
    return Findings(tuple(sites), tuple(refusals))


def _site(scope: Scope, around: MlpSite) -> ActivationSite | None:
    layer = around.gate if around.gate is not None else around.up
    nodes = around.activation_nodes
    members = set(nodes)
    operands = {operand for node in nodes for operand in node.all_input_nodes} - members
    entries = [operand for operand in operands if operand not in scope.constants]
    if len(entries) != 1:
        return None
    added = layer.bias is not None and layer.bias in operands
    bias = scope.value(layer.bias) if added and layer.bias is not None else None
    return ActivationSite(
        around.name,
        around.anchor,
        nodes,
        (entries[0],),
        function=around.activation,
        channels=layer.out_features,
        bias=bias,
        mlp=around,
    )
