"""What the finders of linear, MLP, norm and softmax sites share: constants, sizes, regions, evaluation."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from graphopt.shapes import Shapes, shapes_of
from graphopt.sites import vocabulary
from graphopt.sites.vocabulary import kind
from graphopt.sites.vocabulary_names import FOLDABLE

if TYPE_CHECKING:
    from graphopt.graph import Graph

# A region's own arithmetic on sizes stays far below this.
_MOST_SIZE_NODES = 200


class Scope:
    """One graph as the finders see it.

    Sites made from it list as `inputs` only the values that decide the result: weights, other constants, and the
    sizes that reshapes read are not among them.
    """

    def __init__(self, graph: Graph) -> None:
        """Args: graph: not changed while the scope is in use."""
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.constants = _constants(graph)
        self._names: set[str] = set()
        self._folded: dict[fx.Node, torch.Tensor | None] = {}

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Shapes and types in the model's own symbols; observed at the first use."""
        return shapes_of(self.graph)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...] | None:
        """The shape of the node's one tensor, None where it is unknown."""
        return self.shapes.shape(node)

    def unique_name(self, node: fx.Node) -> str:
        """The name of the site that starts from `node`."""
        stem = name = vocabulary.name_of(node)
        count = 1
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def varying(self, node: fx.Node) -> list[fx.Node]:
        """The operands that depend on the model's inputs."""
        return [n for n in node.all_input_nodes if n not in self.constants]

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a constant that is stored or cheap to compute."""
        if node not in self._folded:
            self._folded[node] = vocabulary.constant(self.graph, node) if node in self.constants else None
        return self._folded[node]

    def constant_shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a constant; reads no weights."""
        if node.op == "get_attr":
            shape = getattr(self.graph.weight(node), "shape", None)
            return None if shape is None else tuple(shape)
        symbolic = self.shape(node)
        if symbolic is None or not all(size.is_Integer for size in symbolic):
            return None
        return tuple(map(int, symbolic))

    def is_vector(self, node: fx.Node, length: int | None = None) -> bool:
        """Whether a constant holds one number per feature of the last axis, and `length` of them."""
        shape = self.constant_shape(node) if node in self.constants else None
        if not shape or any(size != 1 for size in shape[:-1]):
            return False
        return shape[-1] == length if length is not None else shape[-1] > 1

    def live_users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read `node` and are not dead code themselves."""
        return [user for user in node.users if not _dead(user)]

    def region(self, members: Iterable[fx.Node], output: fx.Node) -> tuple[fx.Node, ...] | str:
        """The closed region of `members`, all of which `output` depends on; or the reason why it is none.

        Arithmetic on the sizes of members belongs to the region where it ends in it. As every member leads to
        `output` and only `output` leads outside, the region is convex.
        """
        inside = set(members)
        for node in sorted(inside - {output}, key=self.order.__getitem__):
            for user in node.users:
                if user not in inside and not self._absorbed(user, inside):
                    return f"its intermediate value {vocabulary.name_of(node)!r} {_use(user)}"
        rest = inside - {output}
        return (*sorted(rest, key=self.order.__getitem__), output)

    def _absorbed(self, user: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether `user` is dead or only reads sizes for the region; it then joins `inside`."""
        if _dead(user):
            inside.add(user)
            return True
        if kind(user) not in vocabulary.SHAPES:
            return False
        found: set[fx.Node] = set()
        pending = [user]
        while pending:
            node = pending.pop()
            if node.op == "output" or len(found) > _MOST_SIZE_NODES:
                return False
            found.add(node)
            pending += [n for n in node.users if n not in inside and n not in found]
        inside |= found
        return True


def _constants(graph: Graph) -> frozenset[fx.Node]:
    """The nodes that no input reaches."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        alone = not operands and kind(node) in FOLDABLE
        if node.op == "get_attr" or alone or (operands and found.issuperset(operands)):
            found.add(node)
    return frozenset(found)


def _dead(node: fx.Node) -> bool:
    return not node.users and node.op == "call_function"


def _use(user: fx.Node) -> str:
    return "is an output of the model" if user.op == "output" else f"is used by {vocabulary.name_of(user)!r} too"


def same_value(node: fx.Node) -> bool:
    """Whether `node` passes its first operand on: identity, a cast between float types, dropout at inference."""
    name = kind(node)
    if name == "getitem":
        given = vocabulary.source(node)
        return given is not None and kind(given) == "dropout" and bool(node.args[1] == 0) and same_value(given)
    if name == "dropout":
        # aten.dropout(x, p, train); ONNX dropout takes a tensor there, and trains only where a model says so.
        return bool(vocabulary.argument(node, 2, "train", False) is False)
    return name == "identity" or (name == "cast" and not vocabulary.narrows(node))


def strip(node: fx.Node) -> fx.Node:
    """The value behind identities, float casts and dropout."""
    while same_value(node):
        given = vocabulary.source(node)
        if given is None:
            break
        node = given
    return node


def stored(node: fx.Node) -> fx.Node:
    """The weight behind identities and float casts of a constant; the constant itself if it is computed."""
    found = strip(node)
    return found if found.op == "get_attr" else node


def evaluate(scope: Scope, nodes: Collection[fx.Node], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Run `nodes` (producers first) in double precision on other values of what enters them.

    Args:
        scope: of the graph.
        nodes: what to run; casts between float types pass their operand on.
        given: values of nodes from outside; constants that are not given have their own values.

    Raises:
        ValueError: a node cannot be run like this.
    """
    values = dict(given)

    def lookup(node: fx.Node) -> Any:
        if node not in values:
            value = scope.value(node)
            if value is None:
                raise ValueError(f"the value of {node.name} is unknown")
            values[node] = value.double() if value.is_floating_point() else value
            if value.numel() == 1 and value.is_floating_point():
                values[node] = values[node].reshape(())
        return values[node]

    for node in nodes:
        if same_value(node):
            values[node] = lookup(node.args[0])  # type: ignore[arg-type]  # the operand of a unary operator
            continue
        if node.op != "call_function":
            raise ValueError(f"{node.name} runs on onnxruntime")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lookup)
        try:
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target
        except Exception as error:  # whatever torch says, this is no function of such values
            raise ValueError(f"{node.name} cannot be evaluated: {error}") from error
    return values
