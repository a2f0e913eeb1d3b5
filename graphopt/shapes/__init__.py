"""Shapes in the model's own symbols: observed at a few sizes, then expressed as formulas."""

from graphopt.shapes.express import SymbolicValue
from graphopt.shapes.infer import Shapes, shapes_of

__all__ = ["Shapes", "SymbolicValue", "shapes_of"]
