"""FLOP counts by operator name: a table that grows by one decorated function per operator.

Conventions: a multiply-add is 2 FLOPs; one evaluation of a function (exp, tanh, sqrt, erf ...), a comparison or a
rounding is 1; moving, selecting, converting and indexing data is 0. Composite operators count the steps of their
formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sympy

Shape = tuple[sympy.Expr, ...]


class MissingShapeError(Exception):
    """A FLOP function asked for a shape that is unknown."""


@dataclass(frozen=True)
class Call:
    """What a FLOP function sees of one node."""

    kind: str
    """`MatMul`, `com.microsoft::Attention`, `aten::mm`, `graphopt::linear_attention`."""
    inputs: tuple[Shape | None, ...]
    """Shapes by position; None for an omitted operand, one that is no tensor, or an unknown shape."""
    outputs: tuple[Shape | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    """ONNX attributes; for torch operators, all arguments that are no tensors, by their names in the schema."""
    tensors: tuple[Shape, ...] = ()
    """All operands that are tensors, also those inside lists."""

    def input(self, index: int) -> Shape:
        """The shape of an operand.

        Raises:
            MissingShapeError: it is unknown or omitted.
        """
        return _get(self.inputs, index, f"input {index}")

    def output(self, index: int = 0) -> Shape:
        """The shape of a result.

        Raises:
            MissingShapeError: it is unknown.
        """
        return _get(self.outputs, index, f"output {index}")

    def has(self, index: int) -> bool:
        """Whether an operand is given."""
        return index < len(self.inputs) and self.inputs[index] is not None


def _get(shapes: tuple[Shape | None, ...], index: int, what: str) -> Shape:
    shape = shapes[index] if index < len(shapes) else None
    if shape is None:
        raise MissingShapeError(f"the shape of its {what} is unknown")
    return shape


FlopFunction = Callable[[Call], sympy.Expr]
_Function = TypeVar("_Function", bound=FlopFunction)


@dataclass(frozen=True)
class Entry:
    """How one kind of node is counted."""

    count: FlopFunction
    contraction: bool = False
    """Multiply-adds make up the bulk: matrix products, convolutions, attention."""


_entries: dict[str, Entry] = {}


def flops(*kinds: str, contraction: bool = False) -> Callable[[_Function], _Function]:
    """Enter the decorated function as the FLOP count of the named kinds; a later entry replaces an earlier one.

    `@flops("mylib::my_op")` counts the torch operator `torch.ops.mylib.my_op`, imported or not.

    Args:
        kinds: operator types of ai.onnx bare, all others with their domain or namespace.
        contraction: the count belongs into `Cost.matmul_flops`.
    """

    def enter(function: _Function) -> _Function:
        for kind in kinds:
            _entries[kind] = Entry(function, contraction)
        return function

    return enter


def lookup(kind: str) -> Entry | None:
    """The entry of a kind, None where there is none."""
    return _entries.get(kind)


def elements(shape: Shape) -> sympy.Expr:
    """The number of elements of a shape."""
    return sympy.Mul(*shape)
