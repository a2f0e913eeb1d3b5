"""What the values of one emitted graph are called: as in the graph that was read, wherever that is possible."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import onnx
from torch import fx

from graphopt.backends.onnx.builder import Names, need
from graphopt.graph import Graph, Origin
from graphopt.onnxfile.scopes import captured, is_constant, stored


class Naming:
    """The ONNX names of a graph's values."""

    def __init__(
        self,
        graph: Graph,
        proto: onnx.GraphProto,
        names: Names,
        outer: Mapping[str, str],
        weights: Mapping[str, str],
        *,
        moved: bool,
    ) -> None:
        """Name what has a name; a new value that is a graph output takes the output's name.

        Args:
            graph: whose values.
            proto: what it was read from.
            names: those that are taken anywhere in the model.
            outer: of a body, new names of captured values by old ones.
            weights: of a body, new names of the weights around it by old ones.
            moved: whether a body came to a place where its names may mean something else, out of a function.
        """
        self.of: dict[fx.Node, str] = {}
        self.outputs: list[str] = []
        """Of the graph."""
        self._graph = graph
        self._proto = proto
        self._names = names
        self._moved = moved
        # Names of outputs that another value has now than in the graph that was read.
        self._taken: set[str] = set()
        from_outside, own = set(graph.captured), stored(proto)
        for node in graph.nodes:
            name = node.meta.get("onnx_name")
            if name is None:
                continue
            if node.op == "placeholder" and name in from_outside:
                self.of[node] = outer.get(name, name)
            elif node.op == "get_attr" and "onnx" not in node.meta and name not in own:
                self.of[node] = weights.get(name, name)
            elif not (moved and _is_computed(node)):
                self.of[node] = name
        holders = {name: node for node, name in self.of.items()}
        for spec, result in zip(graph.outputs, graph.results, strict=True):
            self.outputs.append(self._output(spec.name, result, holders))

    def _output(self, name: str, result: fx.Node, holders: dict[str, fx.Node]) -> str:
        """Give the output's value the output's name where it may have it; the name of the output itself."""
        if self.of.get(result) == name:
            return name
        holder = holders.get(name)
        fixed = name in self._graph.captured or self._is_fixed(name, holder)
        if self._graph.body is not None and (fixed or self._moved):
            name = self._names.fresh(name)  # the outputs of a body are known by their position
        else:
            need(not fixed, f"output {name!r} is an input or a weight too, so it cannot become another value")
            self._taken.add(name)
            if holder is not None:  # the value that had the output's name is still needed: it steps aside
                self.of[holder] = self._names.fresh(f"{name}/original")
        if result not in self.of and result.op != "get_attr":
            self.of[result] = name
            holders[name] = result
        return name

    def _is_fixed(self, name: str, holder: fx.Node | None) -> bool:
        """Whether the name is that of an input, or of a weight that something refers to by it."""
        if holder is not None and holder.op != "get_attr":
            return holder.op == "placeholder"
        own = name in stored(self._proto)
        if not own and not any(is_constant(n) and name in n.output for n in self._proto.node):
            return False
        return (own and holder is not None) or any(name in captured(n) for n in self._proto.node)

    def value(self, node: fx.Node) -> str:
        """The name of a node's value."""
        if node not in self.of:
            scope = node.meta.get("graphopt_site", "graphopt")
            stem = node.meta.get("onnx_stem") or node.meta.get("onnx_name") or f"{scope}/{node.name}"
            self.of[node] = self._names.fresh(stem)
        return self.of[node]

    def argument(self, value: Any) -> str:
        """The name of an argument, empty for None."""
        return self.value(value) if isinstance(value, fx.Node) else ""

    def results(self, node: fx.Node) -> list[str]:
        """The outputs of a new node."""
        items = outputs_of(node)
        count = node.kwargs.get("outputs")
        if isinstance(count, int) and count > 1:  # an operator that wants all of its outputs named
            return [self.value(items[i]) if i in items else self._unread(node, i) for i in range(count)]
        if not items:
            return [self.value(node)]
        return [self.value(items[i]) if i in items else "" for i in range(max(items) + 1)]

    def _unread(self, node: fx.Node, index: int) -> str:
        return self._names.fresh(f"graphopt/{node.name}/{index}")

    def renamed(self, node: fx.Node, origin: Origin) -> dict[str, str]:
        """The outputs of a node that was read: new names by old ones."""
        declared = origin.proto.output
        if len(declared) == 1:
            return {declared[0]: self.value(node)}
        items = outputs_of(node)
        found = {declared[i]: self.value(item) for i, item in items.items() if declared[i]}
        # What nothing reads any more still has to be called something where it may not be left out.
        for name in (name for i, name in enumerate(declared) if name and i not in items):
            if name in self._taken:
                found[name] = self._names.fresh(f"{name}/original")
            elif self._moved or origin.index < 0:
                found[name] = self._names.fresh(name)
        return found


def _is_computed(node: fx.Node) -> bool:
    """Whether an ONNX node defines the value; that of a Constant is a weight here."""
    return node.op.startswith("call") or "onnx" in node.meta


def outputs_of(node: fx.Node) -> dict[int, fx.Node]:
    """The values that are taken out of a node with several outputs, by output."""
    return {int(u.args[1]): u for u in node.users if picks_output(u)}  # type: ignore[arg-type]  # an index


def picks_output(node: fx.Node) -> bool:
    """Whether the node takes one value out of several, rather than a part of a tensor."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and "rank" not in source.meta
