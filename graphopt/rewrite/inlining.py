"""Putting the nodes of a body in the place of the operator that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.graph import Graph, attribute, fresh_attribute, set_attribute
from graphopt.onnxfile.scopes import defined, is_constant
from graphopt.sites.vocabulary import name_of
from graphopt.subgraphs import SubgraphOperator, bodies_of

_NAMES = ("onnx", "onnx_name", "onnx_tensor", "onnx_stem")
"""What a node remembers that holds in its own graph only."""


def obstacle(body: Graph, values: Sequence[Any]) -> str | None:
    """Why the nodes of `body` cannot stand in another graph on these values, or None where they can."""
    empty = {node for node, value in zip(body.placeholders, values, strict=True) if value is None}
    return "it returns an input that is left out" if empty.intersection(body.results) else None


def inline(graph: Graph, at: fx.Node, body: Graph, values: Sequence[Any]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Copy the nodes of `body` in front of `at`.

    Args:
        graph: changed in place.
        at: a node of `graph`.
        body: stays as it is; its weights are shared.
        values: what the inputs of the body are; None for an empty one.

    Returns:
        What the body returns; and all new nodes, producers first.
    """
    copy = _Copy(graph, at, body)
    mapping: dict[fx.Node, Any] = dict(zip(body.placeholders, values, strict=True))
    with graph.fx.inserting_before(at):
        for node in body.nodes:
            if node.op == "get_attr":
                mapping[node] = copy.weight(node)
            elif node.op not in ("placeholder", "output"):
                mapping[node] = copy.call(node, mapping)
    return [mapping[node] for node in body.results], copy.made


def take_name(old: fx.Node, new: fx.Node) -> None:
    """Let a value that was inlined be known by the name of the result that it replaces; weights have names already."""
    if "onnx_name" in old.meta and new.op != "get_attr":
        new.meta["onnx_name"] = old.meta["onnx_name"]


class _Copy:
    """One body on its way into a graph."""

    def __init__(self, graph: Graph, at: fx.Node, body: Graph) -> None:
        self.made: list[fx.Node] = []
        self._graph = graph
        self._body = body
        self._stem = name_of(at)
        self._folder = "".join(c if c.isalnum() and c.isascii() else "_" for c in self._stem)
        self._own = defined(body.proto) if body.proto is not None else set()
        self._stored_at: dict[str, str] | None = None
        self._brought: dict[str, Any] = self._unread()

    def _unread(self) -> dict[str, Any]:
        """Weights that the body itself does not read any more, for the bodies within it, which know them by name."""
        proto = self._body.proto
        if proto is None:
            return {}
        found: dict[str, Any] = {n.output[0]: n for n in proto.node if is_constant(n)}
        found |= {t.name: t for t in getattr(proto, "initializer", ())}
        found |= {s.values.name: s for s in getattr(proto, "sparse_initializer", ())}
        read = {n.meta.get("onnx_name") for n in self._body.nodes if n.op == "get_attr"}
        return {
            name: {"onnx_brought": message, "onnx_stem": f"{self._stem}/{name}"}
            for name, message in found.items()
            if name not in read
        }

    def weight(self, node: fx.Node) -> fx.Node:
        """The weight in the new graph: one that it knows by name already, or one that is stored anew."""
        name, value = node.meta.get("onnx_name"), self._body.weight(node)
        if name is not None and name not in self._own:
            # A body sees the weights of the scopes around it under their own names, and so does this graph.
            new = self._stored(node, value, self._target_of(name))
            new.meta["onnx_name"] = name
            return new
        new = self._stored(node, value)
        message = _definition(node)
        if message is not None:
            new.meta["onnx_brought"] = message
            new.meta["onnx_stem"] = self._renamed(node)
        if name is not None:
            self._brought[name] = new.meta
        return new

    def _stored(self, node: fx.Node, value: Any, target: str | None = None) -> fx.Node:
        if target is None or attribute(self._graph.module, target) is not value:
            target = fresh_attribute(self._graph.module, f"graphopt.inline.{self._folder}.{node.name}")
            set_attribute(self._graph.module, target, value)
        new = self._graph.fx.create_node("get_attr", target)
        new.meta = _portable(node)
        self.made.append(new)
        return new

    def _target_of(self, name: str) -> str | None:
        """Where the graph stores a weight that it knows by this name."""
        if self._stored_at is None:
            named = (n for n in self._graph.nodes if n.op == "get_attr" and "onnx_name" in n.meta)
            self._stored_at = {n.meta["onnx_name"]: str(n.target) for n in named}
        return self._stored_at.get(name)

    def call(self, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> fx.Node:
        """The same call on the new operands."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), mapping.__getitem__)
        target = self._module(node) if node.op == "call_module" else node.target
        new = self._graph.fx.create_node(node.op, target, args, kwargs, name=node.name)
        new.meta = _portable(node)
        if "onnx_name" in node.meta or "onnx_stem" in node.meta:
            new.meta["onnx_stem"] = self._renamed(node)
        origin = node.meta.get("onnx")
        if origin is not None and origin.holds_for(node):
            # It stands nowhere in the graph that it comes to.
            new.meta["onnx"] = replace(origin, index=-1, target=target, kwargs=dict(new.kwargs))
            if self._body.onnx is not None:
                new.meta.setdefault("onnx_version", self._body.onnx.opset(origin.proto.domain))
        self.made.append(new)
        return new

    def _renamed(self, node: fx.Node) -> str:
        return f"{self._stem}/{node.meta.get('onnx_stem') or node.meta.get('onnx_name') or node.name}"

    def _module(self, node: fx.Node) -> str:
        module: torch.nn.Module = attribute(self._body.module, str(node.target))
        if isinstance(module, SubgraphOperator) and not module.is_call:
            module = module.copy()
            _hand_down(module, self._brought)
        target = fresh_attribute(self._graph.module, f"{node.target}_of_{self._folder}")
        self._graph.module.add_submodule(target, module)
        return target


def _portable(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key not in _NAMES}


def _definition(node: fx.Node) -> Any:
    """What defines a weight: an initialiser, or a Constant node; None for one that a pass has made."""
    origin = node.meta.get("onnx")
    return node.meta.get("onnx_brought") or node.meta.get("onnx_tensor") or (None if origin is None else origin.proto)


def _hand_down(operator: SubgraphOperator, brought: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the bodies of an operator, which know weights by name, know those that were stored anew; in place."""
    for body in operator.bodies.values():
        own = defined(body.proto) if body.proto is not None else set()
        seen = {key: meta for key, meta in brought.items() if key not in own}
        for node in body.nodes if seen else ():
            known = seen.get(node.meta.get("onnx_name", "")) if node.op == "get_attr" else None
            if known is None:
                continue
            del node.meta["onnx_name"]
            node.meta.update({key: known[key] for key in ("onnx_brought", "onnx_stem") if key in known})
            operator.edited = True
        for inner, _, _ in bodies_of(body) if seen else ():
            _hand_down(inner, seen)
            operator.edited |= inner.edited
