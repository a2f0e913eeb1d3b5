"""Parameters, bytes, FLOPs and peak activation memory as expressions in the model's own symbols."""

# The tables enter their counts when they are imported.
from graphopt.cost import attention_operators, contractions, pointwise
from graphopt.cost.compare import Row, compare
from graphopt.cost.display import format_expr, format_number
from graphopt.cost.model import Cost, cost_of
from graphopt.cost.table import Call, MissingShapeError, flops

__all__ = [
    "Call",
    "Cost",
    "MissingShapeError",
    "Row",
    "attention_operators",
    "compare",
    "contractions",
    "cost_of",
    "flops",
    "format_expr",
    "format_number",
    "pointwise",
]
