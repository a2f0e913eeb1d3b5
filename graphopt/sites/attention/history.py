"""What was done to queries and keys before a site: rotary embedding, and joining with a cache."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import attribute
from graphopt.sites import vocabulary
from graphopt.sites.attention.view import View
from graphopt.sites.vocabulary import kind, operands, source

MOVING = frozenset(
    {
        "reshape",
        "transpose",
        "unsqueeze",
        "squeeze",
        "identity",
        "cast",
        "expand",
        "slice",
        "gather",
        "select",
    }
    | {"getitem", "split", "unbind", "tile", "repeat_interleave"}
)
_DEPTH = 24


def past_of(view: View, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The cached keys and values, where both are joined with a part of the model's inputs."""
    keys, values = _cached(k), _cached(v)
    return None if keys is None or values is None else (keys, values)


def _cached(node: fx.Node) -> fx.Node | None:
    joined = vocabulary.skip(node, MOVING - {"slice", "gather", "select", "getitem", "split", "unbind"})
    if kind(joined) != "concat":
        return None
    parts = [p for p in operands(joined) if p is not None]
    if len(parts) != 2:
        return None
    return parts[0] if vocabulary.skip(parts[0], MOVING).op == "placeholder" else None


def rotated(view: View, node: fx.Node) -> bool:
    """Whether a value comes from a rotary embedding: x cos + rotate(x) sin, whole or in part."""
    pending = [(node, 0)]
    while pending:
        current, depth = pending.pop()
        name = kind(current)
        if name == "rotary_embedding" or _rotates(current):
            return True
        if depth > _DEPTH:
            continue
        if name in MOVING or name == "identity":
            given = source(current)
            pending += [(given, depth + 1)] if given is not None else []
        elif name in ("concat", "stack", "mul", "div"):
            pending += [(p, depth + 1) for p in operands(current) if p is not None]
    return False


def _rotates(node: fx.Node) -> bool:
    """Whether it is a c ± b s, where a and b are parts of one value and c, s are cosines and sines."""
    if kind(node) not in ("add", "sub"):
        return False
    products = [p for p in operands(node) if p is not None and kind(p) == "mul"]
    if len(products) != 2:
        return False
    sides = [[f for f in operands(p) if f is not None] for p in products]
    return any(
        len(sides[0]) == len(sides[1]) == 2
        and _origin(sides[0][i]) is _origin(sides[1][j])
        and _origin(sides[0][1 - i]) is not _origin(sides[0][i])
        and turns(sides[0][1 - i])
        and turns(sides[1][1 - j])
        for i in (0, 1)
        for j in (0, 1)
    )


def turns(node: fx.Node) -> bool:
    """Whether a factor is a cosine or sine: computed as one, or looked up in a table of such values."""
    behind = vocabulary.ancestors([node], stop=lambda n: kind(n) in (*vocabulary.SHAPES, "matmul", "linear"), limit=60)
    if any(kind(n) in ("cos", "sin") for n in behind):
        return True
    tables = [_weight(n) for n in behind if n.op == "get_attr"]
    floats = [t for t in tables if t is not None and t.numel() > 1]
    return bool(floats) and all(float(t.abs().max()) <= 1.0 + 1e-3 for t in floats)


def _weight(node: fx.Node) -> torch.Tensor | None:
    module = node.graph.owning_module
    value = None if module is None else attribute(module, str(node.target))
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _origin(node: fx.Node) -> fx.Node:
    """The value that a slice, a half, or a negated half is taken from."""
    for _ in range(_DEPTH):
        name = kind(node)
        given = source(node)
        if given is None or (name not in MOVING and name not in ("neg", "concat", "stack")):
            return node
        node = given
    return node
