"""Softmax operators and what they are there for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.base import Findings, Refusal, SoftmaxSite
from graphopt.sites.regions import Scope
from graphopt.sites.vocabulary import kind

if TYPE_CHECKING:
    from graphopt.graph import Graph

# From this size on a softmax goes over a vocabulary: no attention span or label set is meant to be that long.
VOCABULARY = 8192
# Stands for an unknown rank: larger than any real one.
_ANY_RANK = 99
_LAYOUT = frozenset({"identity", "cast", "dropout", "reshape", "squeeze", "unsqueeze", "transpose", "getitem"})
# What stands between the probabilities of an attention and the values: clean-up of empty rows, masks, layout.
_CLEANUP = _LAYOUT | {"where", "isnan", "isinf", "nan_to_num", "masked_fill", "expand", "mul", "tile", "slice"}
_PRODUCTS = frozenset({"matmul", "einsum", "fused_matmul", "gemm", "baddbmm"})


def find(graph: Graph) -> Findings:
    """All softmax operators of `graph`, and those that normalise several axes at once."""
    scope = Scope(graph)
    sites, refusals = [], []
    for node in graph.nodes:
        if kind(node) != "softmax":
            continue
        found = _site(scope, node)
        if isinstance(found, str):
            refusals.append(Refusal("softmax", vocabulary.name_of(node), found))
        else:
            sites.append(found)
    return Findings(tuple(sites), tuple(refusals))


def _site(scope: Scope, node: fx.Node) -> SoftmaxSite | str:
    x = vocabulary.source(node)
    if x is None or x in scope.constants:
        return "it depends on no input of the model"
    shape = scope.shape(x)
    # Before opset 13 a softmax flattens the axes from `axis` on: only the shape tells whether there are several.
    rank = len(shape) if shape is not None else _ANY_RANK
    written = vocabulary.axis(node)
    axis = written % rank
    if vocabulary.softmax_axis(node, rank) is None:
        real = [] if shape is None else [i for i in range(axis, rank) if shape[i] != 1]
        if shape is None or len(real) > 1:
            return f"it normalises all axes from {written} on together, as Softmax does before opset 13"
        axis = real[0] if real else rank - 1
    length: int | str | None = None
    if shape is not None:
        length = int(shape[axis]) if shape[axis].is_Integer else str(shape[axis])
        written = axis - rank
    role = _role(scope, node, length)
    return SoftmaxSite(scope.unique_name(node), node, (node,), (x,), axis=written, role=role, length=length)


def _role(scope: Scope, node: fx.Node, length: int | str | None) -> str:
    def weighs(user: fx.Node, given: fx.Node) -> bool:
        # A product with a constant is a linear layer on the probabilities.
        others = [n for n in user.all_input_nodes if n is not given]
        return kind(user) in _PRODUCTS and bool(others) and not any(n in scope.constants for n in others)

    if _reaches(node, _CLEANUP, weighs):
        return "attention"
    if isinstance(length, int) and length >= VOCABULARY:
        return "vocabulary"
    if _reaches(node, _LAYOUT, lambda user, given: user.op == "output"):
        return "classifier"
    return "other"


def _reaches(node: fx.Node, through: frozenset[str], wanted: Callable[[fx.Node, fx.Node], bool]) -> bool:
    """Whether a user for which `wanted(user, value)` holds is reached by way of operators in `through`."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if any(wanted(user, value) for user in value.users):
            return True
        pending += [user for user in value.users if kind(user) in through]
    return False
