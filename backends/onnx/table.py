"""Which function lowers which torch function; keyed by name, so `torch.exp`, `x.exp()` and aten.exp share one entry."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from graphopt.backends.onnx.builder import Builder
from graphopt.errors import GraphOptError

_NAMES = {operator.matmul: "matmul", operator.truediv: "div", operator.getitem: "getitem"}


@dataclass
class Call:
    """One fx node to lower.

    Attributes:
        builder: where its ONNX nodes go.
        node: the fx node.
        args: its positional arguments, with ONNX value names in place of fx nodes.
        kwargs: its keyword arguments, likewise.
    """

    builder: Builder
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def operand(self, index: int, name: str) -> fx.Node | None:
        """The fx node behind an argument, by position or name; None where it is absent."""
        args = self.node.args
        value = args[index] if index < len(args) else self.node.kwargs.get(name)
        return value if isinstance(value, fx.Node) else None

    def rank(self, index: int = 0) -> int:
        """Rank of the fx node behind positional argument `index`."""
        return meta_of(self.node.args[index])[1]

    def dtype(self, index: int = 0) -> torch.dtype:
        """Element type of the fx node behind positional argument `index`."""
        return meta_of(self.node.args[index])[0]

    def axis(self, value: int, index: int = 0) -> int:
        """A non-negative axis."""
        return value + self.rank(index) if value < 0 else value


Lowering = Callable[[Call], str | list[str]]
"""Adds the nodes; returns the name of the value, or those of an operator with several outputs."""
_L = TypeVar("_L", bound=Lowering)
_table: dict[str, Lowering] = {}
_for_target: dict[tuple[str, str], Lowering] = {}


def lowers(*names: str, target: str | None = None) -> Callable[[_L], _L]:
    """Register a lowering for functions by name; with `target`, only for that backend."""

    def enter(function: _L) -> _L:
        for name in names:
            if target is None:
                _table[name] = function
            else:
                _for_target[target, name] = function
        return function

    return enter


def lookup(node: fx.Node, target: str) -> Lowering | None:
    """The lowering of a node for a backend, or None."""
    name = function_name(node)
    return _for_target.get((target, name)) or _table.get(name)


def function_name(node: fx.Node) -> str:
    """`graphopt::linear_attention` for our operators, the bare function name for torch's."""
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
        return name.removeprefix("aten::")
    return _NAMES.get(target) or str(getattr(target, "__name__", target))


def meta_of(value: Any) -> tuple[torch.dtype, int]:
    """Element type and rank that were observed at an fx node."""
    return _observed(value, "dtype"), _observed(value, "rank")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape that was observed at an fx node; only its static sizes mean anything."""
    shape: tuple[int, ...] = _observed(value, "shape")
    return shape


def _observed(value: Any, key: str) -> Any:
    assert isinstance(value, fx.Node)
    if key not in value.meta:
        raise GraphOptError(
            f"cannot lower to ONNX: the {key} of value {value.name!r} was not noted; splice with an example, "
            'or set node.meta["dtype"], ["rank"] and ["shape"]'
        )
    return value.meta[key]
