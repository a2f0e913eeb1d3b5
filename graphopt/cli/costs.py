"""Costs as the command line shows them: expressions in the model's own dims, and numbers for given sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graphopt.cli.terminal import size

if TYPE_CHECKING:
    from graphopt.graph import Graph

_LABELS = {
    "parameters": "parameters",
    "weight_bytes": "weights",
    "flops": "FLOPs",
    "matmul_flops": "of these in products",
    "peak_activation_bytes": "peak activations",
}
_BYTES = ("weight_bytes", "peak_activation_bytes")


def of(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The costs of a graph as plain data.

    Args:
        graph: what to count.
        sizes: of symbolic dims; the others get the defaults of `graphopt.cost`.

    Returns:
        For each quantity its `expression`, the `dims` in it, and its `value` at `sizes`; the nodes that are
        `uncounted`; only a `reason` where nothing can be computed.
    """
    from graphopt.cost import cost_of, format_expr
    from graphopt.errors import GraphOptError

    try:
        cost = cost_of(graph, reference=dict(sizes))
    except Exception as error:  # a model that cannot be costed can still be rewritten
        return {"reason": f"{error}" or type(error).__name__}
    try:
        values: Mapping[str, int] = cost.at(cost.reference)
    except GraphOptError:
        values = {}
    data: dict[str, Any] = {
        name: {
            "expression": format_expr(expression),
            "dims": sorted(symbol.name for symbol in expression.free_symbols),
            "value": values.get(name),
        }
        for name, expression in cost.quantities().items()
    }
    used = {symbol for expression in cost.quantities().values() for symbol in expression.free_symbols}
    data["sizes"] = {symbol.name: number for symbol, number in cost.reference.items() if symbol in used}
    data["growth"] = cost.growth()
    data["uncounted"] = dict(cost.unknown)
    return data


def at(cost: Mapping[str, Any]) -> str:
    """At which sizes the numbers hold, in words."""
    sizes = ", ".join(f"{name}={number}" for name, number in cost.get("sizes", {}).items())
    return f"at {sizes}" if sizes else "value"


def lines(cost: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Lines of a table that shows one cost: quantity, number, expression."""
    for key, label in _LABELS.items():
        if key in cost:
            yield label, _number(cost, key), _expression(cost, key)


def rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Lines of a table that compares two costs: quantity, both numbers, their ratio, both expressions."""
    for key, label in _LABELS.items():
        if key in before and key in after:
            old, new = before[key]["value"], after[key]["value"]
            ratio = f"{new / old:.3g}" if old and new is not None else ""
            numbers = _number(before, key), _number(after, key)
            yield label, *numbers, ratio, _expression(before, key), _expression(after, key)


def notes(cost: Mapping[str, Any]) -> Iterator[str]:
    """What the figures leave out."""
    if "reason" in cost:
        yield f"the cost is unknown: {cost['reason']}"
    if cost.get("uncounted"):
        names = list(cost["uncounted"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"the FLOPs and activations leave out {', '.join(names[:3])}{more}, whose cost is unknown"


def _expression(cost: Mapping[str, Any], key: str) -> str:
    """The expression where it says more than the number."""
    return str(cost[key]["expression"]) if cost[key]["dims"] else ""


def _number(cost: Mapping[str, Any], key: str) -> str:
    from graphopt.cost import format_number

    value = cost[key]["value"]
    if value is None:
        return "unknown"
    return size(value) if key in _BYTES else format_number(value)
