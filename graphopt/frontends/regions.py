"""Dissolving the regions that torch.export wraps around `torch.no_grad` and disabled autocast."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.graph import attribute, fresh_attribute

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule) -> None:
    """Move the nodes of such regions into the graph itself, where passes see them.

    Gradients stay as they were: a float result of a `no_grad` region is detached where it would carry one.
    """
    for node in list(module.graph.nodes):
        body = _body(module, node)
        if body is not None:
            _inline(module, node, *body)
    module.graph.lint()


def _body(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...], bool] | None:
    """The region's graph, its arguments, and whether its results carry no gradient."""
    if node.op != "call_function":
        return None
    if node.target is _GRAD:
        enabled, inner, *rest = node.args
        return attribute(module, str(_node(inner).target)), tuple(rest), not enabled
    # An enabled autocast region casts on its own: dissolving it would change the numbers.
    if node.target is _AUTOCAST and not node.args[2]:
        inner, *rest = node.args[4:]
        return attribute(module, str(_node(inner).target)), tuple(rest), False
    return None


def _inline(module: fx.GraphModule, node: fx.Node, body: fx.GraphModule, args: tuple[Any, ...], detached: bool) -> None:
    inline_regions(body)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(placeholders, args, strict=True))
    graph = module.graph
    carries = detached and any(_carries_gradient(module, n) for n in args if isinstance(n, fx.Node))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                mapping[inner] = graph.get_attr(_adopt(module, body, str(inner.target)))
                mapping[inner].meta = dict(inner.meta)
            elif inner.op not in ("placeholder", "output"):
                mapping[inner] = graph.node_copy(inner, lambda n: mapping[n])
        output = next(n for n in body.graph.nodes if n.op == "output")
        results: Any = fx.node.map_arg(output.args[0], lambda n: mapping[n])
        if carries:
            results = fx.node.map_arg(results, lambda n: _detach(graph, n))
    _replace(node, results)
    inner_node = _node(node.args[1] if node.target is _GRAD else node.args[4])
    graph.erase_node(node)
    if not inner_node.users:
        graph.erase_node(inner_node)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _replace(node: fx.Node, results: Any) -> None:
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
        return
    for user in list(node.users):
        assert user.target is operator.getitem, "a region's results are taken out one by one"
        index: Any = user.args[1]
        value = results[index]
        if isinstance(value, fx.Node):
            user.replace_all_uses_with(value)
        else:
            for each in list(user.users):
                put_constant(each, user, value)
        user.graph.erase_node(user)


def put_constant(user: fx.Node, node: fx.Node, value: Any) -> None:
    """Make `user` take a constant instead of the value of `node`."""

    def swap(argument: fx.Node) -> Any:
        return value if argument is node else argument

    user.args = fx.node.map_arg(user.args, swap)
    user.kwargs = fx.node.map_arg(user.kwargs, swap)


def _detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _carries_gradient(module: fx.GraphModule, start: fx.Node) -> bool:
    """Whether a trainable parameter or a float input stands behind a value."""
    seen, stack = set[fx.Node](), [start]
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if node in seen or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        if node.op == "get_attr" and getattr(attribute(module, str(node.target)), "requires_grad", False):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _adopt(module: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """Give the graph's module what the region's graph reads from its own."""
    value = attribute(body, target)
    name = fresh_attribute(module, target.replace(".", "_"))
    if isinstance(value, torch.Tensor):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)
    return name
