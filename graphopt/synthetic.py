"""Valid random inputs from the model's own input specification."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.dialect.control import MADE_UP_TRIPS, at_most
from graphopt.errors import GraphOptError
from graphopt.graph import Graph, ValueSpec

# Sizes for symbolic dims: the first dim of an input is taken for a batch, others for a length.
BATCH, LENGTH = 2, 32
# Tried in turn until the model runs: position tables may be short, a batch may have to be 1.
_SIZES = ((BATCH, LENGTH), (BATCH, 8), (1, LENGTH), (1, 8), (1, 1))
_SMALL = 4
# Integer inputs that index no table may be masks, positions or lengths: 0 and 1 are valid as each of them.
_SMALLEST_TABLE = 2
# Of one input: 8 GB of floats.
_MOST_ELEMENTS = 1 << 31


class Synthetic:
    """Random inputs of sizes that the model accepts.

    Floats are standard normal, integers lie within the table that they index, other integers and booleans are ones.
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, int] | None = None) -> None:
        """Find sizes: the usual ones if the model runs with them, else others.

        Args:
            graph: the model.
            sizes: sizes of symbolic dims by name.

        Raises:
            GraphOptError: an input is no tensor, or `sizes` names a dim that the model lacks.
        """
        self._graph = graph
        self._limits = index_limits(graph)
        given = dict(sizes or {})
        known = {d for spec in graph.inputs for d in spec.shape or () if isinstance(d, str)}
        for name in given:
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise GraphOptError(f"the model has no symbolic dim {name!r}; it has {listed}")
        usual = [_usual(spec, given, BATCH, LENGTH) for spec in graph.inputs]
        self._shapes = next((s for s in self._candidates(given) if self._runs(s)), usual)

    def _candidates(self, given: Mapping[str, int]) -> Iterator[list[list[int]]]:
        for batch, length in _SIZES:
            yield [_usual(spec, given, batch, length) for spec in self._graph.inputs]
        found = _observed(self._graph, given)
        if found is not None:
            yield found

    def _runs(self, shapes: list[list[int]]) -> bool:
        try:
            with torch.no_grad(), at_most(MADE_UP_TRIPS):
                self._graph.execute(*self._values(shapes, 0))
        except Exception:  # whatever an operator says of sizes that do not fit
            return False
        return True

    def batch(self, seed: int) -> tuple[Any, ...]:
        """One value per input."""
        return self._values(self._shapes, seed)

    def _values(self, shapes: list[list[int]], seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            _random(spec, shape, self._limits.get(spec.name), generator)
            for spec, shape in zip(self._graph.inputs, shapes, strict=True)
        )


def _random(spec: ValueSpec, shape: list[int], limit: int | None, generator: torch.Generator) -> Any:
    assert isinstance(spec.dtype, torch.dtype)
    if math.prod(shape) > _MOST_ELEMENTS:
        raise GraphOptError(f"cannot make random values for input {spec} of {shape}; give calibration data")
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool or limit is None:
        # An integer that indexes nothing is most often a mask: everything visible is always valid.
        return torch.ones(shape, dtype=spec.dtype)
    return torch.randint(0, limit, shape, generator=generator).to(spec.dtype)


def _usual(spec: ValueSpec, given: Mapping[str, int], batch: int, length: int) -> list[int]:
    if not isinstance(spec.dtype, torch.dtype) or spec.shape is None:
        raise GraphOptError(f"cannot make random values for input {spec}; give calibration data")
    usual = [batch] + [length] * len(spec.shape)
    return [d if isinstance(d, int) else given.get(d or "", usual[i]) for i, d in enumerate(spec.shape)]


def _observed(graph: Graph, given: Mapping[str, int]) -> list[list[int]] | None:
    """Sizes that respect the relations between dims that `graphopt.shapes` found out."""
    from graphopt.shapes import shapes_of

    shapes = shapes_of(graph)
    found = []
    for node in graph.placeholders:
        shape = shapes.shape(node)
        if shape is None:
            return None
        found.append([int(_at(dim, given)) for dim in shape])
    return found


def _at(dim: Any, given: Mapping[str, int]) -> Any:
    free = getattr(dim, "free_symbols", ())
    return dim.subs({symbol: given.get(symbol.name, _SMALL) for symbol in free}) if free else dim


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
