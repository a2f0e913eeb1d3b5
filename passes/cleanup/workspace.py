"""The graph under rewriting: what rules ask about it, how they change it, and the record of each change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.dialect import lookup, operator_of
from graphopt.graph import Graph, attribute, fresh_attribute, set_attribute
from graphopt.onnxfile.scopes import mentioned
from graphopt.rewrite.inlining import inline
from graphopt.sites.vocabulary import name_of
from graphopt.subgraphs import weights_of_bodies

from .dims import Shape
from .facts import UNKNOWN, Fact, Facts, View
from .folding import Folder
from .operators import may_act, operation

_OF_THE_VALUE = ("val", "dtype", "rank", "shape")
"""What other parts of the toolkit note about a value; it holds for whatever computes the same value."""
Key = tuple[str, str]
"""A rule and the name of the node that it was applied to."""


@dataclass(frozen=True, eq=False)
class Application:
    """One use of one rule."""

    rule: str
    name: str
    """Of the rewritten node, as the model's author knows it."""
    node: str
    """Of the rewritten node in the graph."""
    old: fx.Node | None
    """The node of the original graph whose value was replaced; None for a node that another rule made."""
    new: fx.Node
    """What took its place, at that time."""
    reason: str = ""

    @property
    def key(self) -> Key:
        """What to exclude in order not to apply it again."""
        return self.rule, self.node


class Workspace:
    """A copy of a graph, the facts about it, and the changes made so far."""

    def __init__(self, graph: Graph, folder: Folder, excluded: Iterable[Key] = (), only: Iterable[str] = ()) -> None:
        """Args: graph: left as it is. excluded: what not to apply. only: nodes to rewrite, empty for all."""
        self.graph = graph.copy()
        self.folder = folder
        self.applications: list[Application] = []
        self._excluded = frozenset(excluded)
        self._only = frozenset(only)
        self._original = dict(zip(self.graph.nodes, graph.nodes, strict=True))
        _restore_origins(self._original)
        self._forward: dict[fx.Node, fx.Node] = {}
        self._fresh: set[fx.Node] = set()
        self._made: set[fx.Node] = set()
        self._from_body: set[fx.Node] = set()
        self._inlined: dict[fx.Node, list[fx.Node]] = {}
        self._stored: dict[Any, str] = {}
        self._kept: frozenset[fx.Node] = frozenset()
        self._named = _named(graph)
        self.results = frozenset(self.graph.results)
        self.module = self.graph.module
        self.opset = 0 if graph.onnx is None else graph.onnx.opset()
        self.facts = Facts(self.graph, folder)

    def forget(self) -> None:
        """Drop all facts: they are inferred anew from the graph as it is now, just as a second run would."""
        self.folder.refusals.clear()
        self._inlined.clear()
        self.facts = Facts(self.graph, self.folder)

    def fact(self, value: Any) -> Fact:
        """The facts about an operand; nothing is known of a hole."""
        return self.facts.learn(value) if isinstance(value, fx.Node) else UNKNOWN

    def shape(self, value: Any) -> Shape | None:
        """An operand's shape."""
        return self.fact(value).shape

    def constant(self, value: Any) -> torch.Tensor | None:
        """An operand's value if it is the same for all inputs."""
        return self.fact(value).value

    def view(self, node: fx.Node) -> View:
        """A call of a dialect function with the facts about its operands."""
        entry = operator_of(node.target)  # type: ignore[arg-type]  # a call_function's target is callable
        assert entry is not None
        return View(self.facts, node, entry)

    def name(self, node: fx.Node) -> str:
        """The node's name in reports: that of the original node that it stands for."""
        return name_of(self._original.get(node, node))

    def allows(self, rule: str, node: fx.Node) -> bool:
        """Whether the rule may be applied to the node."""
        chosen = not self._only or self.name(node) in self._only
        return chosen and (rule, self._original.get(node, node).name) not in self._excluded

    def call(self, at: fx.Node, name: str, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """A new call of a default-domain operator in the model's opset, in front of `at`."""
        entry = lookup("", name, self.opset)
        assert entry is not None, f"no dialect function for {name}"
        return self._insert(at, entry.function, args, kwargs)

    def again(self, at: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """The same call as `at` on other operands; it stays the same ONNX node."""
        return self._insert(at, at.target, args, dict(at.kwargs))

    def _insert(self, at: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self.graph.fx.inserting_before(at):
            node = self.graph.fx.call_function(target, args, kwargs)
        # The value of `at` is about to be this one.
        node.meta = {k: v for k, v in at.meta.items() if k in ("onnx_name", "graphopt_site", *_OF_THE_VALUE)}
        # Export renames operands by name, so an operand that occurs twice could not be renamed once.
        given = [a for a in at.args if a is not None]
        alike = target is at.target and kwargs == at.kwargs and len(args) == len(at.args)
        if alike and len(given) == len(set(map(id, given))) and "onnx" in at.meta:
            node.meta["onnx"] = at.meta["onnx"]
        self._fresh.add(node)
        self._made.add(node)
        self.facts.learn(node)
        return node

    def inlined(self, at: fx.Node, body: Graph, values: Sequence[Any]) -> list[fx.Node]:
        """The results of a body whose nodes now stand in front of `at`; once per round, however often it is asked."""
        if at not in self._inlined:
            self._inlined[at], new = inline(self.graph, at, body, values)
            for node in new:
                self.facts.learn(node)
            self._fresh.update(new)
            self._from_body.update(new)
        return self._inlined[at]

    def made_by_inlining(self, node: fx.Node) -> bool:
        """Whether the node came out of a body."""
        return node in self._from_body

    def weight(self, at: fx.Node, value: torch.Tensor) -> fx.Node:
        """A constant in front of `at`; equal ones are stored once."""
        key = (value.dtype, tuple(value.shape), digest(value))
        if key not in self._stored:
            stem = "".join(c if c.isalnum() and c.isascii() else "_" for c in at.name)
            self._stored[key] = fresh_attribute(self.module, f"graphopt.cleanup.{stem}")
            set_attribute(self.module, self._stored[key], value.contiguous().clone())
        with self.graph.fx.inserting_before(at):
            node = self.graph.fx.create_node("get_attr", self._stored[key])
        self.facts.learn(node)
        return node

    def integers(self, at: fx.Node, values: Iterable[int]) -> fx.Node:
        """A vector of int64 in front of `at`."""
        return self.weight(at, torch.tensor(list(values), dtype=torch.int64))

    def replace(self, rule: str, node: fx.Node, new: fx.Node, reason: str = "") -> bool:
        """Let `new` take the place of `node`; no where that would change the interface.

        A graph output keeps its own node: an alias would leave it without its name, a constant without a
        producer.
        """
        if new is node or (node in self.results and new not in self._fresh):
            return False
        old = self._original.get(node)
        self.applications.append(Application(rule, self.name(node), (old or node).name, old, new, reason))
        if new in self._fresh:
            self._fresh.discard(new)
            if node in self._original:
                self._original[new] = self._original[node]
        for key in _OF_THE_VALUE:
            if key in node.meta:
                new.meta.setdefault(key, node.meta[key])
        node.replace_all_uses_with(new)
        self._forward[node] = new
        if node in self.results:
            self.results = frozenset(self.graph.results)
        return True

    def made(self, node: fx.Node) -> bool:
        """Whether a rule made the node, so that it has not been looked at."""
        return node in self._made

    def resolve(self, node: fx.Node) -> fx.Node:
        """What stands for the node after all changes."""
        while node in self._forward:
            node = self._forward[node]
        return node

    def original(self, node: fx.Node) -> fx.Node | None:
        """The node of the original graph that has the same value."""
        return self._original.get(node)

    def may_act(self, node: fx.Node) -> bool:
        """Whether the node, for all we know, does something beside computing its results."""
        return may_act(node, self.graph.onnx.proto.functions if self.graph.onnx is not None else ())

    def keep_dead(self) -> None:
        """Spare what has no use now."""
        live: set[fx.Node] = set()
        for node in reversed(list(self.graph.nodes)):
            if node.op == "output" or node in live:
                live.update({node, *node.all_input_nodes})
        self._kept = frozenset(n for n in self.graph.nodes if n not in live)

    def erase_dead(self) -> int:
        """Erase what no output needs; the number of erased nodes, weights included, unused outputs of nodes not.

        A weight that something knows by its name has a use without an edge: it stays in the model all the same.
        """
        count = 0
        for node in reversed(list(self.graph.nodes)):
            if node.users or node in self._kept or node.meta.get("onnx_name") in self.facts.overridable:
                continue
            if self.may_act(node):
                continue
            # To fx random operators are impure, also where they turned out to draw nothing and were replaced.
            if node in self._forward or node.op == "call_module" or not node.is_impure():
                count += operation(node) != "getitem" and node.meta.get("onnx_name") not in self._named
                self.graph.fx.erase_node(node)
        return count

    def finish(self) -> Graph:
        """The rewritten graph, without the weights that nothing names any more."""
        used = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        for node in self._original:
            target = str(node.target)
            if node.op == "get_attr" and target not in used:
                used.add(target)
                _drop(self.module, target)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.graph


def digest(value: torch.Tensor) -> bytes:
    """A hash of a tensor's bytes, which tells -0 from 0."""
    data = value.detach().cpu().contiguous().reshape(-1)
    state = hashlib.blake2b(digest_size=16)
    if data.numel():
        state.update(data.view(torch.uint8).numpy().data)
    return state.digest()


def _named(graph: Graph) -> frozenset[str]:
    """ONNX names of weights that bodies use, or that the model speaks of beside its nodes."""
    mentioned_too = mentioned(graph.onnx.proto) if graph.onnx is not None and graph.body is None else set()
    return frozenset(weights_of_bodies(graph) | mentioned_too)


def _drop(module: torch.nn.Module, target: str) -> None:
    path, _, last = target.rpartition(".")
    owner = attribute(module, path) if path else module
    delattr(owner, last)


def _restore_origins(twins: Mapping[fx.Node, fx.Node]) -> None:
    """Tensor attributes are nodes: in a copy, an origin has to speak of the copied ones."""
    for node, original in twins.items():
        origin = node.meta.get("onnx")
        has_tensor = any(isinstance(v, fx.Node) for v in node.kwargs.values())
        if origin is not None and has_tensor and original.meta["onnx"].holds_for(original):
            node.meta["onnx"] = replace(origin, kwargs=dict(node.kwargs))
