"""The table of ONNX operators: which torch function stands for which operator from which opset on.

A function takes the ONNX inputs as positional parameters in order (`None` for an omitted one, variadic
inputs as `*args`) and the ONNX attributes as keyword-only parameters under their ONNX names. An attribute
whose name is a Python keyword gets a trailing underscore (`to` stays `to`, `else` would be `else_`).
Attributes arrive as int, float, str, list of those, or `torch.Tensor` for tensor attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .strings import accepting_strings

__all__ = ["Operator", "lookup", "operator", "operator_of", "table"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One ONNX operator over the range of opsets in which its meaning holds."""

    domain: str
    """`""` for ai.onnx."""
    name: str
    """The operator type, `"Reshape"`."""
    since: int
    """The opset from which this meaning holds, until a newer entry of the same name."""
    function: Callable[..., Any]
    """The module-level torch function."""
    values: tuple[int, ...] = ()
    """Indices of the inputs whose values the function reads, mostly because they decide the output shapes."""
    counted: bool = False
    """The function wants the keyword `outputs`: how many the node declares, trailing holes included."""
    typed: bool = False
    """The function takes the keyword `types`: the ONNX element type codes of the inputs, 0 where unknown.

    For operators to which int4 in its int8 carrier is not int8.
    """


_versions: dict[tuple[str, str], list[Operator]] = {}
_by_function: dict[Callable[..., Any], Operator] = {}


def operator(
    name: str,
    *,
    domain: str = "",
    since: int = 1,
    values: tuple[int, ...] = (),
    counted: bool = False,
    typed: bool = False,
) -> Callable[[_Function], _Function]:
    """Enter the decorated function into the table.

    Raises:
        ValueError: when the operator has a function for that opset, or the function is in the table.
    """

    def enter(function: _Function) -> _Function:
        if not _canonical(domain):
            function = accepting_strings(name, function)
        entry = Operator(_canonical(domain), name, since, function, values, counted, typed)
        versions = _versions.setdefault((entry.domain, name), [])
        if function in _by_function or any(other.since == since for other in versions):
            raise ValueError(f"expected one function for {name} since {since}, found another")
        versions.append(entry)
        versions.sort(key=lambda other: other.since, reverse=True)
        _by_function[function] = entry
        return function

    return enter


def lookup(domain: str, name: str, opset: int) -> Operator | None:
    """Return the newest entry that holds in `opset`, or None when the operator has no function there."""
    versions = _versions.get((_canonical(domain), name), ())
    return next((entry for entry in versions if entry.since <= opset), None)


def operator_of(function: Callable[..., Any]) -> Operator | None:
    """Return the entry of a dialect function, or None for any other callable."""
    return _by_function.get(function)


def table() -> tuple[Operator, ...]:
    """Return all entries, ordered by domain, name and opset."""
    return tuple(sorted(_by_function.values(), key=lambda entry: (entry.domain, entry.name, entry.since)))


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
