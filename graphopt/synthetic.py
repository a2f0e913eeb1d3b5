"""Valid random inputs from the model's own input specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.graph import Graph, ValueSpec

# Sizes for symbolic dims: the first dim of an input is taken for a batch, others for a length.
BATCH, LENGTH = 2, 32
# Integer inputs that index no table may be masks, positions or lengths: 0 and 1 are valid as each of them.
_SMALLEST_TABLE = 2


def random_inputs(graph: Graph, seed: int = 0, sizes: Mapping[str, int] | None = None) -> tuple[Any, ...]:
    """One random value per input: normal floats, integers within the table that they index, ones for masks.

    Args:
        graph: the model.
        seed: of the random generator.
        sizes: sizes of symbolic dims by name.

    Raises:
        GraphOptError: an input is no tensor, or `sizes` names a dim that the model lacks.
    """
    sizes = dict(sizes or {})
    known = {d for spec in graph.inputs for d in spec.shape or () if isinstance(d, str)}
    for name in sizes:
        if name not in known:
            raise GraphOptError(
                f"the model has no symbolic dim {name!r}; it has {', '.join(sorted(known)) or 'none'}"
            )
    generator = torch.Generator().manual_seed(seed)
    limits = index_limits(graph)
    return tuple(_random(spec, limits.get(spec.name), sizes, generator) for spec in graph.inputs)


def _random(spec: ValueSpec, limit: int | None, sizes: Mapping[str, int], generator: torch.Generator) -> Any:
    if not isinstance(spec.dtype, torch.dtype) or spec.shape is None:
        raise GraphOptError(f"cannot make random values for input {spec}; give calibration data")
    shape = [_size(d, i, sizes) for i, d in enumerate(spec.shape)]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool or limit is None:
        # An integer that indexes nothing is most often a mask: everything visible is always valid.
        return torch.ones(shape, dtype=spec.dtype)
    return torch.randint(0, limit, shape, generator=generator).to(spec.dtype)


def _size(dim: int | str | None, axis: int, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return sizes.get(dim or "", BATCH if axis == 0 else LENGTH)


def index_limits(graph: Graph) -> dict[str, int]:
    """For each integer input that directly indexes a constant table: the number of rows of the smallest one."""
    limits: dict[str, int] = {}
    for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
        if isinstance(spec.dtype, torch.dtype) and not spec.dtype.is_floating_point:
            rows = [r for user in _through_casts(node) if (r := _table_rows(graph, user)) is not None]
            if rows and min(rows) >= _SMALLEST_TABLE:
                limits[spec.name] = min(rows)
    return limits


def _through_casts(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in node.users:
        found.append(user)
        if any(word in str(user.target).lower() for word in ("cast", "identity", "to.dtype", "_to_copy")):
            found += _through_casts(user)
    return found


def _table_rows(graph: Graph, user: fx.Node) -> int | None:
    """Rows of the constant that `user` looks its index up in."""
    text = getattr(user.target, "__name__", str(user.target)).lower()
    if not text.startswith(("gather", "embedding")) or not user.args or not isinstance(user.args[0], fx.Node):
        return None
    table = user.args[0]
    if table.op != "get_attr" or user.kwargs.get("axis", 0) != 0:
        return None
    value = graph.weight(table)
    return len(value) if getattr(value, "ndim", 0) else None


def describe_ranges(graph: Graph) -> str:
    """What the random values are, in words."""
    limits = index_limits(graph)
    parts = []
    for spec in graph.inputs:
        if isinstance(spec.dtype, torch.dtype) and spec.dtype.is_floating_point:
            parts.append(f"{spec.name} standard normal")
        elif spec.name in limits:
            parts.append(f"{spec.name} uniform in [0, {limits[spec.name]})")
        else:
            parts.append(f"{spec.name} all ones")
    return ", ".join(parts)
