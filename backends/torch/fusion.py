"""Linear layers and the rational functions behind them as one operator, for targets whose kernels compute both."""

from __future__ import annotations

import torch
from torch import fx

import graphopt.ops  # noqa: F401  # registers torch.ops.graphopt
from graphopt.graph import Graph
from graphopt.rewrite.splice import erase_dead
from graphopt.sites import LinearSite
from graphopt.sites.linear import search
from graphopt.sites.regions import Scope
from graphopt.sites.vocabulary import kind

_RATIONAL = "graphopt::group_rational"


def fuse_linear_rational(graph: Graph) -> Graph:
    """A copy in which each linear layer that only a `graphopt::group_rational` reads is one node with it.

    Weights keep their names; one that is stored [K, C] is transposed on the way, which moves nothing. Bodies of
    operators stay as they are, and so do layers whose weight is cast first.
    """
    fused = graph.copy()
    if not any(_is_rational(node) for node in fused.nodes):
        return fused
    scope = Scope(fused)
    for site in search(scope).sites:
        users = list(site.output.users)
        if len(users) == 1 and _reads_rows(users[0], site.output) and not _is_cast(scope, site):
            _fuse(fused, site, users[0])
    fused.lint()
    fused.module.recompile()
    return fused


def _is_rational(node: fx.Node) -> bool:
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name == _RATIONAL


def _reads_rows(node: fx.Node, value: fx.Node) -> bool:
    """Whether `node` is the rational function of `value`, and not one with `value` among its coefficients."""
    others = (*node.args[1:], *node.kwargs.values())
    return _is_rational(node) and bool(node.args) and node.args[0] is value and value not in others


def _is_cast(scope: Scope, site: LinearSite) -> bool:
    """Whether the weight or the bias is computed with in another type than it is stored in."""
    pending = [node for node in (site.weight, site.bias) if node is not None]
    while pending:
        node = pending.pop()
        if kind(node) == "cast":
            return True
        pending += [user for user in node.users if user in scope.constants]
    return False


def _fuse(graph: Graph, site: LinearSite, rational: fx.Node) -> None:
    weight, bias = site.weight, site.bias
    with graph.fx.inserting_before(rational):
        if site.transposed:
            weight = graph.fx.call_function(torch.transpose, (weight, 0, 1))
        if bias is not None and graph.weight(bias).ndim > 1:  # [1, C]
            bias = graph.fx.call_function(torch.flatten, (bias,))
        arguments = (site.x, weight, bias, *rational.args[1:])
        new = graph.fx.call_function(torch.ops.graphopt.linear_rational.default, arguments, dict(rational.kwargs))
    new.meta = dict(rational.meta)
    rational.replace_all_uses_with(new)
    erase_dead(graph, [rational, *site.nodes])
