"""Putting the nodes of a body in the place of the operator that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from graphopt.graph import Graph, attribute, fresh_attribute, set_attribute
from graphopt.subgraphs import bodies_of


def obstacle(body: Graph) -> str | None:
    """Why the nodes of `body` cannot stand in another graph, or None where they can."""
    if bodies_of(body):
        return "it holds loops or branches, which know its weights by name"
    return None


def inline(graph: Graph, at: fx.Node, body: Graph, values: Sequence[Any]) -> tuple[list[Any], list[fx.Node]]:
    """Copy the nodes of `body` in front of `at`.

    Args:
        graph: changed in place.
        at: a node of `graph`.
        body: stays as it is; its weights are shared.
        values: what the inputs of the body are; None for an empty one.

    Returns:
        What the body returns: nodes, or None for an empty value; and all new nodes, producers first.
    """
    before = set(graph.nodes)
    mapping: dict[fx.Node, Any] = dict(zip(body.placeholders, values, strict=True))
    names = {n.meta["onnx_name"]: n for n in graph.nodes if "onnx_name" in n.meta}
    with graph.fx.inserting_before(at):
        for node in body.nodes:
            if node.op == "get_attr":
                mapping[node] = _weight(graph, body, node, names)
            elif node.op not in ("placeholder", "output"):
                mapping[node] = _copied(graph, body, node, mapping, names)
    return [mapping[node] for node in body.results], [node for node in graph.nodes if node not in before]


def take_name(old: fx.Node, new: fx.Node) -> None:
    """Let a value that was inlined be known by the name of the result that it replaces."""
    if "onnx_name" in old.meta:
        new.meta["onnx_name"] = old.meta["onnx_name"]


def _weight(graph: Graph, body: Graph, node: fx.Node, names: dict[str, fx.Node]) -> fx.Node:
    value = body.weight(node)
    visible = names.get(node.meta.get("onnx_name", ""))
    # A body sees the weights of the scopes around it under their own names.
    if visible is not None and visible.op == "get_attr" and graph.weight(visible) is value:
        return visible
    target = fresh_attribute(graph.module, f"graphopt.inline.{node.name}")
    set_attribute(graph.module, target, value)
    return graph.fx.create_node("get_attr", target)


def _copied(
    graph: Graph, body: Graph, node: fx.Node, mapping: dict[fx.Node, Any], names: dict[str, fx.Node]
) -> fx.Node:
    copied = graph.fx.create_node(
        node.op,
        node.target,
        fx.node.map_arg(node.args, mapping.__getitem__),
        fx.node.map_arg(node.kwargs, mapping.__getitem__),
        name=node.name,
    )
    copied.meta = dict(node.meta)
    if node.op == "call_module":
        copied.target = fresh_attribute(graph.module, str(node.target))
        graph.module.add_submodule(copied.target, attribute(body.module, str(node.target)))
    origin = node.meta.get("onnx")
    if origin is not None:
        # It stands nowhere in the graph that it comes to.
        target = copied.target if node.op == "call_module" else origin.target
        copied.meta["onnx"] = replace(origin, index=-1, target=target, kwargs=dict(copied.kwargs))
    if copied.meta.get("onnx_name") in names:
        del copied.meta["onnx_name"]
    return copied
