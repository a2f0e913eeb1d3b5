"""The model's own symbols: one positive integer for each named or unnamed dynamic dimension of its inputs."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Sequence

import sympy

from graphopt.graph import Dim, ValueSpec

# What exporters write where they have no name: two of these in one model are two different sizes.
_NAMELESS = frozenset({"", "?", "none", "unk", "unknown", "-1", "dynamic"})


class SymbolTable:
    """Symbols by display name; a display name is any text, the symbol's own name is an identifier."""

    def __init__(self) -> None:
        self.by_display: dict[str, sympy.Symbol] = {}
        self._taken: set[str] = set()
        self._fresh = 0

    def get(self, display: str) -> sympy.Symbol:
        """The symbol for a display name, made on first use."""
        if display not in self.by_display:
            name = stem = identifier(display)
            count = 0
            while name in self._taken:
                count += 1
                name = f"{stem}_{count}"
            self._taken.add(name)
            self.by_display[display] = sympy.Symbol(name, integer=True, positive=True)
        return self.by_display[display]

    def fresh(self) -> sympy.Symbol:
        """A new symbol `d0`, `d1`, ... for a size that nothing known decides."""
        while f"d{self._fresh}" in self._taken or f"d{self._fresh}" in self.by_display:
            self._fresh += 1
        return self.get(f"d{self._fresh}")


def is_name(text: str | None) -> bool:
    """Whether a dim_param names a dimension, and does not merely say that it is dynamic."""
    return text is not None and text.strip().lower() not in _NAMELESS


def identifier(display: str) -> str:
    """A valid Python identifier that reads like `display`."""
    name = re.sub(r"\W+", "_", display, flags=re.ASCII).strip("_") or "dim"
    return f"n{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def input_shapes(inputs: Sequence[ValueSpec], table: SymbolTable) -> list[tuple[sympy.Expr, ...] | None]:
    """Each input's shape in symbols, None for one that declares no shape.

    Exporters also write sums such as `past_sequence_length + 1` where a name belongs; these are read as sums wherever
    each of their names stands alone in another place.
    """
    alone = {d for spec in inputs for d in spec.shape or () if isinstance(d, str) and d.isidentifier()}

    def expression(spec: ValueSpec, axis: int, dim: Dim) -> sympy.Expr:
        if isinstance(dim, int) and dim >= 0:
            return sympy.Integer(dim)
        if not isinstance(dim, str) or not is_name(dim):
            return table.get(f"{spec.name}_{axis}")
        parsed = None if dim.isidentifier() else parse(dim, alone, table)
        return table.get(dim) if parsed is None else parsed

    return [
        None if spec.shape is None else tuple(expression(spec, axis, dim) for axis, dim in enumerate(spec.shape))
        for spec in inputs
    ]


def parse(text: str, names: set[str], table: SymbolTable) -> sympy.Expr | None:
    """Read sums, products and floor divisions of `names`; None for any other text (it comes from the file)."""
    if len(text) > 200:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return _read(tree, names, table)


def _read(tree: ast.expr, names: set[str], table: SymbolTable) -> sympy.Expr | None:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return sympy.Integer(tree.value)
    if isinstance(tree, ast.Name):
        return table.get(tree.id) if tree.id in names else None
    if not isinstance(tree, ast.BinOp):
        return None
    left, right = _read(tree.left, names, table), _read(tree.right, names, table)
    if left is None or right is None:
        return None
    match tree.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv() if right != 0:
            return sympy.floor(left / right)
    return None
